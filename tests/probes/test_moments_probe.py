"""The ratios expected from the moments of a start, against their definitions and updates made to order."""

import weakref
from dataclasses import replace

import pytest
import torch
from networks import language_model
from scipy import stats
from torch.testing import assert_close

from weightgeom.estimators import gradients
from weightgeom.estimators.gradients import Gathering, gradient_moments, sampled
from weightgeom.estimators.reference_subspaces import Inputs, input_frames, place_of, prediction_frame
from weightgeom.geometry.bootstrap import bootstrap_interval, bootstrap_times
from weightgeom.geometry.nulls import matched_null, moment_root
from weightgeom.interfaces import Setting
from weightgeom.models.adapters import Adapted, LowRank
from weightgeom.objectives.ce import CE
from weightgeom.objectives.dpo import DPO
from weightgeom.probes.moments import EXPECTED, Moments
from weightgeom.probes.rsf import RSF
from weightgeom.table import tabulate
from weightgeom.training.config import Training
from weightgeom.training.fit import outdated_name_allowed

D, K, SEED = 32, 4, 3
TRAINING = Training(max_length=48)
OBJECTIVES = {"ce on text": CE("text"), "ce on chosen": CE("chosen"), "dpo": DPO()}
ARCHITECTURES = ["gpt_neox", "gpt2", "llama", "olmo2", "gemma2"]  # two fused, one plain, two with post-norms
objectives = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture
def at(tokenizer, examples):
    """A setting at a network of an architecture, under an objective."""

    def setting(name, objective=None, seed=SEED) -> Setting:
        model, params = language_model(name, tokenizer)
        objective = objective or DPO()
        return Setting(model, params, params, False, examples, seed, objective, TRAINING)

    return setting


def measured(probe, setting, after):
    return probe.measurement(setting)(after)


def moved(setting, scale=0.05):
    """The weights of the start with Gaussian noise on every matrix and on the gains behind them."""
    generator = torch.Generator().manual_seed(1)
    after = dict(setting.start)
    for matrix in setting.model.architecture.matrices:
        for name in {matrix.parameter, *([matrix.norm.parameter] if matrix.norm else [])}:
            after[name] = after[name] + scale * torch.randn(after[name].shape, generator=generator)
    return after


def values(rows, quantity, k=K, column="value"):
    """One quantity by the matrix's name."""
    rows_of_quantity = [row for row in rows if row["quantity"] == quantity and row["k"] == k]
    by_name = {f"L{row['layer']}.{row['matrix']}": row[column] for row in rows_of_quantity}
    assert len(by_name) == len(rows_of_quantity)
    return by_name


def spaces(setting, k=K):
    """The subspace that each matrix is compared with, by the matrix's name."""
    frames = [
        *input_frames(setting, setting.start, k, Inputs()),
        prediction_frame(setting, setting.start, k),
    ]
    by_place = {frame.place: frame.space for frame in frames}
    return {matrix.name: by_place[place_of(matrix)] for matrix in setting.model.architecture.matrices}


def gathered(setting, **options):
    gathering = Gathering(**{"prompts": 2048, "groups": 16, "batch_size": 16, **options})
    (moments,) = gradient_moments(
        *(setting.model, setting.start, setting.objective, TRAINING, setting.examples),
        *(gathering, setting.seed),
    )
    return moments


def moment_of(matrix, moments, params):
    """C and the mean of what a matrix reads, or of what reaches the stream behind what it writes, in fp64."""
    if matrix.role == "read":
        site = "mlp_input" if matrix.kind in ("gate", "up") else "attention_input"
        (moment,) = (
            moment
            for where, moment in moments.inputs.items()
            if (where.layer, where.name) == (matrix.layer, site)
        )
        return moment.value.double(), moment.mean.double()
    moment = moments.upstream[matrix.name]
    gain = torch.ones(D) if matrix.norm is None else matrix.norm.gain(params)
    fold = torch.diag(gain.double())
    return fold @ moment.value.double() @ fold, fold @ moment.mean.double()


def ratio(basis, second):
    return float(torch.trace(basis.T @ second @ basis) / second.trace()) * len(second) / basis.shape[1]


def by_autograd(setting, directory):
    """The gradient of the trainer's own mean loss over all training examples in one batch, by parameter."""
    model, objective = setting.model, setting.objective
    network = model.with_weights(setting.start).eval()
    arguments = TRAINING.arguments(directory, SEED, "cpu") | {"per_device_eval_batch_size": 1000}
    kept = sampled(setting.examples, 2048, TRAINING.max_length, setting.seed)
    trainer = objective.trainer(network, model.tokenizer, kept, arguments)
    (inputs,) = list(trainer.get_eval_dataloader(trainer.train_dataset))
    network.requires_grad_(True)
    with outdated_name_allowed():
        trainer.compute_loss(network, inputs).backward()
    return {
        name: network.get_parameter(name).grad
        for name in {matrix.parameter for matrix in model.architecture.matrices}
    }


@objectives
@architectures
def test_predicted_and_mean_ratio_are_those_of_the_second_and_first_moment(name, objective, at):
    setting = at(name, objective)
    rows = measured(Moments(resamples=0), setting, moved(setting))
    moments, subspaces = gathered(setting, groups=1), spaces(setting)
    predicted, mean = values(rows, "predicted_ratio"), values(rows, "mean_ratio")
    assert list(predicted) == list(mean) == [matrix.name for matrix in setting.model.architecture.matrices]
    for matrix in setting.model.architecture.matrices:
        second, first = moment_of(matrix, moments, setting.start)
        basis = subspaces[matrix.name].basis
        rtol = 1e-10 if matrix.norm is None else 1e-6  # a gain is folded in fp32
        assert_close(predicted[matrix.name], ratio(basis, second), rtol=rtol, atol=0)
        assert_close(mean[matrix.name], ratio(basis, torch.outer(first, first)), rtol=rtol, atol=0)


@pytest.mark.parametrize("name", ["olmo2", "gemma2"])
def test_the_gain_behind_a_write_changes_what_is_expected_of_it(name, at):
    setting = at(name)
    moments, subspaces = gathered(setting), spaces(setting)
    predicted = values(measured(Moments(), setting, moved(setting)), "predicted_ratio")
    for write, moment in moments.upstream.items():  # the fold of the test above is no identity
        assert abs(ratio(subspaces[write].basis, moment.value.double()) / predicted[write] - 1) > 1e-3


@objectives
@architectures
def test_a_step_of_plain_descent_is_what_the_forecast_says(name, objective, at, tmp_path):
    setting = at(name, objective)
    gradient = by_autograd(setting, tmp_path)
    # A rate so large that the difference of fp32 weights has the digits of the step.
    after = {
        **setting.start,
        **{key: setting.start[key] - 1e4 * gradient for key, gradient in gradient.items()},
    }
    rows = measured(Moments(), setting, after)
    forecast, measured_ratio = values(rows, "forecast_ratio"), values(rows, "measured_ratio")
    # G is summed in fp32, batch by batch; under DPO it is what is left of chosen minus rejected.
    assert_close(forecast, measured_ratio, rtol=1e-3, atol=1e-4)
    for role in ("read", "write"):
        (correlation,) = [row for row in rows if row["quantity"] == f"{role}_forecast_correlation"]
        assert_close(correlation["value"], 1.0, rtol=0, atol=1e-5)


@architectures
def test_the_forecast_is_the_fraction_of_the_gradient_of_the_mean_loss(name, at, tmp_path):
    setting = at(name)
    gradient = by_autograd(setting, tmp_path)
    forecast = values(measured(Moments(), setting, moved(setting)), "forecast_ratio")
    subspaces = spaces(setting)
    for matrix in setting.model.architecture.matrices:
        of = matrix.of(gradient)
        if matrix.norm is not None:
            of = matrix.norm.gain(setting.start)[:, None] * of
        expected = subspaces[matrix.name].relative_fraction(of if matrix.role == "read" else of.T)
        assert_close(forecast[matrix.name], expected, rtol=1e-3, atol=1e-4)  # fp32, as above


def in_batches(setting, directory, size):
    """The gradients of the trainer's own mean loss of each whole training batch, by parameter."""
    model, objective = setting.model, setting.objective
    network = model.with_weights(setting.start).eval()
    arguments = TRAINING.arguments(directory, SEED, "cpu") | {"per_device_eval_batch_size": size}
    kept = sampled(setting.examples, 2048, TRAINING.max_length, setting.seed)
    trainer = objective.trainer(network, model.tokenizer, kept, arguments)
    network.requires_grad_(True)
    data, gradients = trainer.train_dataset.shuffle(seed=SEED), []
    for inputs in trainer.get_eval_dataloader(data.select(range(len(data) // size * size))):
        network.zero_grad()
        with outdated_name_allowed():
            trainer.compute_loss(network, inputs).backward()
        names = {matrix.parameter for matrix in model.architecture.matrices}
        gradients.append({name: network.get_parameter(name).grad.clone() for name in names})
    assert len(gradients) > 2
    return gradients


@pytest.mark.parametrize("objective", [CE("chosen"), DPO()], ids=["ce", "dpo"])
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "olmo2"])  # fused, transposed, with a norm behind
def test_the_forecast_of_adam_divides_by_the_root_of_the_mean_squared_gradient_of_training_batches(
    name, objective, at, tmp_path
):
    training = replace(TRAINING, batch_size=2, accumulate=2)  # a step has 4, and the probe's batches have 3
    setting = replace(at(name, objective), training=training)
    rows = measured(Moments(batch_size=3, resamples=0), setting, moved(setting))
    mean, batches = by_autograd(setting, tmp_path), in_batches(setting, tmp_path, 4)
    forecast, plain = values(rows, "forecast_adam_ratio"), values(rows, "forecast_ratio")
    subspaces = spaces(setting)
    step = {}
    for parameter, gradient in mean.items():
        squares = torch.stack([gradient[parameter].square() for gradient in batches]).mean(0)
        step[parameter] = gradient / (squares.sqrt() + 1e-8)
    for matrix in setting.model.architecture.matrices:
        of = matrix.of(step)
        if matrix.norm is not None:
            of = matrix.norm.gain(setting.start)[:, None] * of
        expected = subspaces[matrix.name].relative_fraction(of if matrix.role == "read" else of.T)
        # Where a gradient cancels to next to nothing, its sign is that of fp32's rounding.
        assert_close(forecast[matrix.name], expected, rtol=5e-3, atol=5e-3)
    assert max(abs(forecast[name] / plain[name] - 1) for name in forecast) > 0.05


def test_a_single_batch_makes_the_forecast_of_adam_that_of_the_gradients_signs(at, tmp_path):
    setting = at("llama")
    prompts = len(setting.examples.pairs)
    setting = replace(setting, training=replace(TRAINING, batch_size=2 * prompts))
    after = moved(setting)
    forecast = values(
        measured(Moments(resamples=0, precision="float64"), setting, after), "forecast_adam_ratio"
    )
    gradient, subspaces = by_autograd(setting, tmp_path), spaces(setting)
    for matrix in setting.model.architecture.matrices:
        signs = matrix.of(gradient).sign()
        expected = subspaces[matrix.name].relative_fraction(signs if matrix.role == "read" else signs.T)
        assert_close(forecast[matrix.name], expected, rtol=0.02, atol=0.02)  # EPSILON, and signs of rounding


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "olmo2"])
def test_the_forecast_of_an_adapter_is_its_first_step_from_zero(name, optimizer, at, tmp_path):
    setting = at(name)
    generator = torch.Generator().manual_seed(2)
    parameters = {matrix.parameter: matrix for matrix in setting.model.architecture.matrices}
    updates = {}
    for parameter, matrix in parameters.items():
        stored = setting.start[parameter]
        rows, columns = (stored.T if matrix.transposed else stored).shape
        b, a = (0.01 * torch.randn(*shape, generator=generator) for shape in ((rows, 3), (3, columns)))
        updates[parameter] = LowRank(b, a)
    transposed = frozenset(name for name, matrix in parameters.items() if matrix.transposed)
    end = Adapted(setting.start, updates, {}, transposed)
    setting = replace(setting, end=end, training=replace(TRAINING, optimizer=optimizer))
    rows = measured(Moments(resamples=0, precision="float64"), setting, end)
    forecast = values(rows, "forecast_adapter_ratio")
    assert {row["treatment"] for row in rows if row["quantity"] == "forecast_adapter_ratio"} == {optimizer}
    assert not any(row.get("treatment") for row in rows if row["quantity"] == "forecast_adam_ratio")
    gradient, subspaces = by_autograd(setting, tmp_path), spaces(setting)
    for matrix in setting.model.architecture.matrices:
        a = updates[matrix.parameter].a.double()
        inner = matrix.of(gradient).double() @ a.T
        step = (inner if optimizer == "sgd" else inner.sign()) @ a
        if matrix.norm is not None:
            step = matrix.norm.gain(setting.start)[:, None].double() * step
        expected = subspaces[matrix.name].relative_fraction(step if matrix.role == "read" else step.T)
        assert_close(forecast[matrix.name], expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama"])
def test_the_kronecker_form_divides_by_the_roots_of_both_factors_mean_squares(name, at):
    setting = at(name)
    rows = measured(Moments(resamples=0), setting, moved(setting))
    moments, subspaces = gathered(setting, groups=1, positions="all"), spaces(setting)
    for matrix in setting.model.architecture.matrices:
        gradient = moments.gradients[matrix.parameter]
        of = matrix.of({matrix.parameter: gradient.value / gradient.kronecker})
        expected = subspaces[matrix.name].relative_fraction(of if matrix.role == "read" else of.T)
        assert_close(values(rows, "forecast_kronecker_ratio")[matrix.name], expected, rtol=1e-6, atol=0)
    for site, moment in moments.inputs.items():  # over all positions, a² is the diagonal of C_a
        read = next(matrix for matrix in setting.model.architecture.matrices if matrix.module == site.module)
        gradient = moments.gradients[read.parameter]
        squares = gradient.rows if read.transposed else gradient.columns
        assert_close(squares, moment.value.diagonal(), rtol=1e-5, atol=1e-7)
    for write_name, moment in moments.upstream.items():  # and δ² that of C_delta
        (write,) = [matrix for matrix in setting.model.architecture.matrices if matrix.name == write_name]
        gradient = moments.gradients[write.parameter]
        squares = gradient.columns if write.transposed else gradient.rows
        assert_close(squares, moment.value.diagonal(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("unit", ["token", "prompt"])
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "olmo2"])
def test_the_mixture_is_the_mean_over_all_pairings_of_what_is_read_with_what_is_sent_back(
    name, unit, centre, at
):
    setting = at(name)
    options = {"unit": unit, "centre": centre}
    rows = measured(Moments(resamples=0, **options), setting, moved(setting))
    moments, subspaces = gathered(setting, groups=1, **options), spaces(setting)
    mixture = values(rows, "mixture_ratio")
    for matrix in setting.model.architecture.matrices:
        second, first = moment_of(matrix, moments, setting.start)
        if centre:
            second = second + torch.outer(first, first)
        other = moments.others[matrix.name]
        firsts, squares = other.firsts.double(), other.squares.double()
        if matrix.role == "read":
            shape = (1, -1) if matrix.transposed else (-1, 1)
            firsts, squares = (
                matrix.of({matrix.parameter: sums.reshape(shape)}) for sums in (firsts, squares)
            )
        # Σ_nm (x_n x_m) a_n a_mᵀ over pairings: the N terms n = m have C, the others μ μᵀ.
        same, different = squares.sum(), firsts.square().sum() - squares.sum()
        expected = ratio(subspaces[matrix.name].basis, same * second + different * torch.outer(first, first))
        assert_close(mixture[matrix.name], expected, rtol=1e-3, atol=1e-4)


def test_factors_that_are_independent_have_the_ratio_of_the_mixture(generator):
    # N = 50 samples of a and x, independent, both with a mean; their Gram matrix over 4000 draws.
    n, draws = 50, 4000
    mean_a, mean_x = torch.zeros(6).double(), torch.zeros(3).double()
    mean_a[0], mean_x[0] = 0.3, 0.4
    total = torch.zeros(6, 6).double()
    for _ in range(draws):
        a = torch.randn(n, 6, generator=generator, dtype=torch.float64) + mean_a
        x = torch.randn(n, 3, generator=generator, dtype=torch.float64) + mean_x
        total += (x.T @ a).T @ (x.T @ a)
    second = torch.eye(6).double() + torch.outer(mean_a, mean_a)
    rho = 0.16 / 3.16
    expected = second + (n - 1) * rho * torch.outer(mean_a, mean_a)
    share = float(total[0, 0] / total.trace())
    # 1.3132 of 6.3132 with the mixture; the second moments alone say 1.09 of 6.09, the mean alone all.
    assert_close(share, float(expected[0, 0] / expected.trace()), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("optimizer", "forecast"),
    [
        ("adamw", "forecast_adam_ratio"), ("lion", "forecast_adam_ratio"), ("sgd", "forecast_ratio"),
        ("muon", None),
    ],
)  # fmt: skip
def test_the_table_names_the_optimizer_and_the_forecast_that_belongs_to_it(optimizer, forecast, at):
    setting = at("llama")
    setting = replace(setting, training=replace(TRAINING, optimizer=optimizer))
    rows = measured(Moments(resamples=2), setting, moved(setting))
    named = {row["quantity"] for row in rows if row.get("treatment") == optimizer}
    ends = () if forecast is None else (forecast, f"{forecast}_low", f"{forecast}_high")
    assert named == {"measured_ratio", *ends}
    assert not [row for row in rows if row.get("treatment") not in (None, optimizer)]
    columns = list(Moments().summary(tabulate([{"step": 1, **row} for row in rows])))
    shown = {name: f"{name} ({optimizer})" for name in ("forecast", "forecast_adam")}
    belonging = [name for name in shown if f"{name}_ratio" == forecast]
    middle = [shown[name] if name in belonging else name for name in shown]
    assert columns == ["pathway", "matrix", "predicted", *middle, f"measured ({optimizer})"]


@architectures
def test_the_measured_ratio_is_that_of_the_probe_rsf(name, at):
    setting = at(name)
    after = moved(setting)
    rows = measured(Moments(resamples=0, k=[2, K]), setting, after)
    others = measured(RSF(resamples=0, k=[2, K]), replace(setting, objective=None), after)
    ratios = [row for row in others if row["quantity"] == "ratio" and row["subspace"] != "random"]
    for k in (2, K):
        measured_ratio = values(rows, "measured_ratio", k)
        assert_close(measured_ratio, values(ratios, "ratio", k), rtol=1e-12, atol=0)
        assert values(rows, "measured_ratio", k, "subspace") == values(ratios, "ratio", k, "subspace")
        assert values(rows, "measured_ratio", k, "n") == values(ratios, "ratio", k, "n")


def planted(setting, roots, mixture):
    """The weights plus, for every root R with R Rᵀ = C, an update whose vectors on the stream are R z."""
    after = setting.start
    for matrix in setting.model.architecture.matrices:
        shape = matrix.of(after).shape
        if matrix.name in roots:
            x = mixture(shape[0 if matrix.role == "read" else 1]) @ roots[matrix.name].T
            delta = x / x.norm() if matrix.role == "read" else x.T / x.norm()
            if matrix.norm is not None:  # what reaches the stream has the gain behind it
                delta = delta / matrix.norm.gain(setting.start)[:, None]
            after = matrix.replaced(after, matrix.of(after) + delta.float())
    return after


@pytest.mark.parametrize("objective", [CE("chosen"), DPO()], ids=["ce", "dpo"])
@pytest.mark.parametrize("name", ["gpt_neox", "olmo2"])
def test_what_is_sent_back_independently_of_what_is_read_has_the_predicted_ratio(
    name, objective, at, generator
):
    setting = at(name, objective)
    moments = gathered(setting)
    roots = {}
    for matrix in setting.model.architecture.matrices:
        if matrix.of(setting.start).shape[0 if matrix.role == "read" else 1] >= D:
            roots[matrix.name] = moment_root(moment_of(matrix, moments, setting.start)[0])

    def mixture(other):  # orthonormal, so that x = Q Rᵀ has xᵀ x = R Rᵀ = C: the mean over all mixtures
        return torch.linalg.qr(torch.randn(other, D, generator=generator, dtype=torch.float64)).Q

    rows = measured(Moments(), setting, planted(setting, roots, mixture))
    predicted, measured_ratio = values(rows, "predicted_ratio"), values(rows, "measured_ratio")
    assert measured_ratio.keys() == roots.keys() and {name[3:] for name in measured_ratio} >= {"up", "down"}
    # The weights are rounded to fp32: 6e-8 of about 8 in norm, against an update of norm 1.
    assert_close(measured_ratio, {name: predicted[name] for name in measured_ratio}, rtol=1e-5, atol=1e-6)


def test_gaussian_mixtures_of_what_is_read_scatter_about_the_predicted_ratio(at, generator):
    setting = at("llama")
    moments, subspaces = gathered(setting), spaces(setting)
    matrices = setting.model.architecture.matrices
    roots = {matrix.name: moment_root(moment_of(matrix, moments, setting.start)[0]) for matrix in matrices}

    def mixture(other):
        return torch.randn(other, D, generator=generator, dtype=torch.float64)

    after = planted(setting, roots, mixture)
    rows = measured(Moments(), setting, after)
    predicted, measured_ratio = values(rows, "predicted_ratio"), values(rows, "measured_ratio")
    zs = []
    for matrix in matrices:
        delta = (matrix.of(after) - matrix.of(setting.start)).double()
        x = delta if matrix.role == "read" else delta.T
        null = matched_null(x.T @ x, roots[matrix.name], subspaces[matrix.name], SEED)
        zs.append((measured_ratio[matrix.name] - predicted[matrix.name]) * K / D / null.sd)
    # 14 draws from the null: one |z| beyond 4 has probability 6e-5, and their rms about 1, ± 0.19.
    assert len(zs) == 14 and max(map(abs, zs)) < 4
    assert 0.4 < torch.tensor(zs).square().mean().sqrt() < 1.8
    assert max(abs(value - 1) for value in predicted.values()) > 0.3  # the level is not the isotropic one


CHOICES = {"positions": "all", "centre": True, "unit": "prompt", "precision": "float64"}


@pytest.mark.parametrize("choice", CHOICES)
def test_each_choice_of_moments_reaches_them_and_leaves_the_mean_gradient_alone(choice, at):
    setting = at("llama")
    after = moved(setting)
    rows = measured(Moments(**{choice: CHOICES[choice]}), setting, after)
    plain = measured(Moments(), setting, after)
    option = {"dtype": torch.float64} if choice == "precision" else {choice: CHOICES[choice]}
    moments, subspaces = gathered(setting, **option), spaces(setting)
    predicted, mean, default = (
        values(rows, "predicted_ratio"),
        values(rows, "mean_ratio"),
        values(plain, "predicted_ratio"),
    )
    for matrix in setting.model.architecture.matrices:
        second, first = moment_of(matrix, moments, setting.start)
        basis = subspaces[matrix.name].basis
        # fp64 from the sums on: sums in fp32 instead of fp64 differ by 1e-8 and more.
        assert_close(predicted[matrix.name], ratio(basis, second), rtol=1e-12, atol=0)
        assert_close(mean[matrix.name], ratio(basis, torch.outer(first, first)), rtol=1e-10, atol=0)
        assert predicted[matrix.name] != default[matrix.name]
    forecasts = values(rows, "forecast_ratio"), values(plain, "forecast_ratio")
    if choice == "precision":
        assert forecasts[0] != forecasts[1]
        assert_close(forecasts[0], forecasts[1], rtol=1e-3, atol=1e-4)
    else:
        assert forecasts[0] == forecasts[1]


def test_n_counts_the_samples_behind_each_number(at):
    setting = at("llama")
    pairs = len(setting.examples.pairs)
    after = moved(setting)
    scored, all_, prompts, few = (
        measured(probe, setting, after)
        for probe in (Moments(), Moments(positions="all"), Moments(unit="prompt"), Moments(prompts=5))
    )
    for rows in (scored, all_, prompts):
        assert set(values(rows, "forecast_ratio", column="n").values()) == {pairs}
    assert set(values(few, "forecast_ratio", column="n").values()) == {5}
    for quantity in ("predicted_ratio", "mean_ratio"):
        assert set(values(prompts, quantity, column="n").values()) == {pairs}
        (kept,), (every,) = (set(values(rows, quantity, column="n").values()) for rows in (scored, all_))
        assert pairs < kept < every


def test_a_budget_changes_no_number(at):
    setting = at("llama")
    whole, split = (measured(Moments(budget_gb=budget), setting, moved(setting)) for budget in (None, 1e-9))
    assert whole == split


def test_a_list_of_k_gives_the_numbers_of_each_k(at):
    setting = at("llama")
    after = moved(setting)
    curve = measured(Moments(k=[8, 2, D]), setting, after)
    assert [row["k"] for row in curve if row["quantity"] == "predicted_ratio"][:3] == [2, 8, D]
    for k in (2, 8):
        single = measured(Moments(k=k), setting, after)
        for quantity in ("predicted_ratio", "mean_ratio", "forecast_ratio", "measured_ratio"):
            assert_close(values(curve, quantity, k), values(single, quantity, k), rtol=1e-9, atol=0)
    for quantity in ("predicted_ratio", "mean_ratio", "forecast_ratio", "measured_ratio"):
        ones = values(curve, quantity, D)
        assert_close(ones, dict.fromkeys(ones, 1.0))  # k = d holds everything
    assert {row["k"] for row in curve if "correlation" in row["quantity"]} == {2}


@pytest.mark.parametrize("groups", [2, 5])
def test_intervals_are_those_of_a_bootstrap_over_groups_of_prompts(groups, at):
    setting = at("llama")
    rows = measured(Moments(groups=groups, resamples=30), setting, moved(setting))
    gathered_moments, subspaces = gathered(setting, groups=groups), spaces(setting)
    draws = bootstrap_times(groups, 30, SEED).double()
    beyond = 0  # intervals that reach further than a ratio can
    for matrix in setting.model.architecture.matrices:
        basis = subspaces[matrix.name].basis

        def of_gradient(stored, matrix=matrix, basis=basis):
            x = matrix.of({matrix.parameter: stored})
            x = x if matrix.role == "read" else x.T
            return ratio(basis, x.T @ x)

        gradient = gathered_moments.gradients[matrix.parameter].sums.double()
        if matrix.role == "write":
            moments = gathered_moments.upstream[matrix.name].sums.double()
        else:
            (moments,) = (
                moment.sums.double()
                for site, moment in gathered_moments.inputs.items()
                if (site.name, site.layer) == place_of(matrix)
            )
        drawn = {
            # A ratio does not depend on what the sums are divided by.
            "forecast_ratio": [of_gradient(torch.einsum("g,gij->ij", times, gradient)) for times in draws],
            "predicted_ratio": [ratio(basis, torch.einsum("g,gij->ij", times, moments)) for times in draws],
        }
        for quantity, samples in drawn.items():
            expected = bootstrap_interval(values(rows, quantity)[matrix.name], samples, groups)
            assert expected is not None
            interval = [
                values(rows, quantity, column="stderr")[matrix.name],
                values(rows, f"{quantity}_low")[matrix.name],
                values(rows, f"{quantity}_high")[matrix.name],
            ]
            ends = [max(0.0, expected.low), min(D / K, expected.high)]
            # Student's t of one degree is 12.7, and what is resampled is summed in fp32: 1e-6 of it.
            assert_close(interval, [expected.stderr, *ends], rtol=1e-4, atol=1e-4)
            beyond += expected.low < 0 or expected.high > D / K
    assert (beyond > 0) == (groups == 2)


def test_without_resamples_there_are_no_intervals(at):
    setting = at("llama")
    for resamples in (40, 0):
        rows = measured(Moments(resamples=resamples), setting, moved(setting))
        ends = {row["quantity"] for row in rows if row["quantity"].endswith(("_low", "_high"))}
        estimates = ("predicted", "forecast", "forecast_adam")
        expected = {f"{estimate}_ratio_{end}" for estimate in estimates for end in ("low", "high")}
        assert ends == (expected if resamples else set())
        for row in rows:
            estimated = row["quantity"] in [f"{estimate}_ratio" for estimate in estimates]
            assert (row["stderr"] is not None) == (estimated and resamples > 0)


def test_the_correlations_are_pearsons_over_the_layers_and_matrices_of_a_role(at):
    setting = at("llama")
    rows = measured(Moments(k=[K, 8]), setting, moved(setting))
    roles = {matrix.name: matrix.role for matrix in setting.model.architecture.matrices}
    correlations = {row["quantity"]: row for row in rows if row["quantity"].endswith("correlation")}
    expected = {f"{role}_{estimate}" for role in ("read", "write") for estimate in EXPECTED[:-1]}
    assert set(correlations) == {f"{estimate}_correlation" for estimate in expected}
    for key, row in correlations.items():
        role, _, estimate = key.removesuffix("_correlation").partition("_")
        names = [name for name, of in roles.items() if of == role]
        x, y = ([values(rows, f"{which}_ratio")[name] for name in names] for which in (estimate, "measured"))
        assert_close(row["value"], stats.pearsonr(x, y)[0], rtol=1e-9, atol=1e-12)
        assert row["role"] == role and row["k"] == K and row["n"] == len(names) == (10, 4)[role == "write"]


@pytest.mark.parametrize("change", [{"objective": None}, {"from_random": True}])
def test_without_an_objective_or_with_a_random_start_nothing_is_measured(change, at, examples):
    setting = at("llama")
    after = moved(setting)
    without_text = replace(setting, examples=replace(examples, heldout=()))
    with pytest.raises(ValueError, match="the held-out text has fewer than 2 tokens"):
        measured(Moments(), without_text, after)
    assert measured(Moments(), replace(without_text, **change), after) == []


def test_an_unmoved_model_has_no_rows(at):
    setting = at("llama")
    measure = Moments().measurement(setting)
    assert measure(dict(setting.start)) == []
    assert measure(moved(setting)) != []


def test_a_matrix_that_did_not_move_has_an_expectation_and_nothing_measured(at):
    setting = at("llama")
    (q,) = [matrix for matrix in setting.model.architecture.matrices if matrix.name == "L1.q"]
    rows = measured(Moments(), setting, q.replaced(setting.start, q.of(setting.start) + 1))
    assert set(values(rows, "measured_ratio")) == {"L1.q"}
    assert len(values(rows, "predicted_ratio")) == len(setting.model.architecture.matrices)
    assert not [row for row in rows if "correlation" in row["quantity"]]  # of one point there is none


def test_what_is_expected_is_that_of_the_start_at_every_checkpoint(at):
    setting = at("llama")
    measure = Moments().measurement(setting)
    whole, other = measure(moved(setting)), measure(moved(setting, scale=0.5))
    for quantity in ("predicted_ratio", "mean_ratio", "forecast_ratio"):
        assert values(whole, quantity) == values(other, quantity)


@architectures
def test_every_row_has_its_place_its_unit_and_its_number_of_samples(name, at):
    setting = at(name)
    rows = measured(Moments(), setting, moved(setting))
    tabulate([row | {"step": 1} for row in rows])  # refuses what a table cannot hold
    assert {row["unit"] for row in rows} == {"1"} and {row["k"] for row in rows} == {K}
    assert all(row["n"] > 0 for row in rows)
    for matrix in setting.model.architecture.matrices:
        mine = [row for row in rows if (row.get("layer"), row.get("matrix")) == (matrix.layer, matrix.kind)]
        assert len(mine) == len({row["quantity"] for row in mine}) == 13  # seven ratios, three with two ends
        assert {row["subspace"] for row in mine} == {place_of(matrix)[0]}
        assert {row["role"] for row in mine} == {matrix.role}


@pytest.mark.parametrize("k", [None, 1, D, [1, D]])
def test_a_k_that_fits_is_let_through(k, model):
    Moments(k=k).check(model.architecture)


@pytest.mark.parametrize("k", [0, -1, D + 1, [4, D + 1], []])
def test_a_k_that_does_not_fit_is_refused_by_the_name_of_its_key(k, model):
    message = r"probe\.moments\.k must be 1 to 32, the width of the residual stream, got "
    with pytest.raises(ValueError, match=message):
        Moments(k=k).check(model.architecture)


def test_a_matrix_that_no_gradient_reaches_has_only_what_is_measured(examples, tokenizer):
    model, start = language_model("llama", tokenizer)
    o = next(matrix for matrix in model.architecture.matrices if matrix.name == "L0.o")
    start = dict(o.replaced(start, torch.zeros_like(o.of(start))))  # what q, k and v of the layer lead to
    after = {name: weight + 0.01 * torch.ones_like(weight) for name, weight in start.items()}
    setting = Setting(model, start, after, False, examples, 0, DPO(), Training(max_length=48))
    rows = Moments(prompts=6, tokens=256).measurement(setting)(after)
    of_q = {row["quantity"] for row in rows if row.get("layer") == 0 and row["matrix"] == "q"}
    assert "measured_ratio" in of_q and "forecast_ratio" not in of_q


def test_the_sums_of_a_pass_are_gone_before_those_of_the_next_are_made(at, monkeypatch):
    setting, kept, alive = at("llama"), [], []
    totals, hooked = gradients._Sums.totals, gradients._Sums.hooked

    def noted(self, prompts):
        kept.extend(weakref.ref(sums.sums) for sums in self.gradients.values())
        return totals(self, prompts)

    def counted(self, network):
        alive.append(sum(reference() is not None for reference in kept))
        return hooked(self, network)

    monkeypatch.setattr(gradients._Sums, "totals", noted)
    monkeypatch.setattr(gradients._Sums, "hooked", counted)
    measured(Moments(prompts=8, tokens=256, budget_gb=1e-9), setting, moved(setting))
    assert alive == [0] * setting.model.architecture.n_layers and kept

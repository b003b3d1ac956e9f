"""The evidence behind a ratio: intervals, matched levels, q-values, heads, and the budget."""

from dataclasses import replace

import pytest
import torch
from networks import FORMS, language_model
from scipy import stats
from torch.testing import assert_close

from weightgeom.data.world import World
from weightgeom.estimators.gradients import Gathering, gradient_moments
from weightgeom.estimators.reference_subspaces import Inputs, Place, input_frames, place_of, prediction_frame
from weightgeom.interfaces import Setting
from weightgeom.objectives.ce import CE
from weightgeom.objectives.dpo import DPO
from weightgeom.probes.rsf import RSF
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training

D, K = 32, 4
WORLD = World(entities=20, heldout_entities=4, values=5, documents=600, pairs=40, heldout=200)
TRAINING = Training(max_length=48)


@pytest.fixture(scope="module")
def examples() -> Examples:
    return WORLD.examples()


@pytest.fixture(scope="module")
def tokenizer():
    return WORLD.tokenizer()


def setting(model, start, examples, end=None, objective=None) -> Setting:
    return Setting(model, start, end or start, False, examples, 3, objective, TRAINING)


def values(rows, quantity, subspace=None) -> dict[str, float]:
    """One quantity by the name of the matrix or the head, in its own subspace."""
    return {
        f"L{row['layer']}.{row['matrix']}" + (f".{row['head']}" if "head" in row else ""): row["value"]
        for row in rows
        if row["quantity"] == quantity
        and "parameter" not in row
        and row.get("subspace") != "random"
        and (subspace is None or row["subspace"] == subspace)
    }


def planted(model, params, spaces, share, generator):
    """Weights that differ by deltas with this share of their energy inside each matrix's subspace."""
    after = params
    for matrix in model.architecture.matrices:
        basis = spaces[place_of(matrix)].basis
        other = matrix.of(params).shape[0 if matrix.role == "read" else 1]
        whole = torch.linalg.qr(basis, mode="complete").Q
        parts = [
            torch.randn(other, side.shape[1], generator=generator, dtype=torch.float64) @ side.T
            for side in (basis, whole[:, basis.shape[1] :])
        ]
        x = sum(part / part.norm() * s**0.5 for part, s in zip(parts, (share, 1 - share), strict=True))
        assert isinstance(x, torch.Tensor)
        delta = x if matrix.role == "read" else x.T
        if matrix.norm is not None:  # what reaches the stream has the gain of the norm behind it
            delta = delta / matrix.norm.gain(params)[:, None]
        after = matrix.replaced(after, matrix.of(params) + delta.float())
    return after


@pytest.mark.slow
def test_a_planted_share_is_estimated_within_its_interval_in_all_architectures(examples, tokenizer):
    share, covered, intervals = 0.6, 0, 0
    for name in FORMS:
        model, params = language_model(name, tokenizer)
        everything = setting(model, params, replace(examples, heldout=examples.text))
        spaces = {
            frame.place: frame.space
            for frame in [
                *input_frames(everything, params, K, Inputs(tokens=10**6)),
                prediction_frame(everything, params, K),
            ]
        }
        after = planted(model, params, spaces, share, torch.Generator().manual_seed(1))
        # A twentieth of the text that the subspaces stand for is what the probe sees.
        rows = RSF().measurement(setting(model, params, examples))(dict(after))
        low, high, ratio = (values(rows, quantity) for quantity in ("ratio_low", "ratio_high", "ratio"))
        inside = [low[name] <= share * D / K <= high[name] for name in low]
        covered, intervals = covered + sum(inside), intervals + len(inside)
        assert sum(inside) >= 0.6 * len(inside), name
        for matrix in model.architecture.matrices:
            if matrix.role == "write":  # its subspace is known, and the share is exact
                assert_close(ratio[matrix.name], share * D / K, rtol=1e-4, atol=0)
            else:
                assert 0 < high[matrix.name] - low[matrix.name] < 3
    # 95 % intervals, in clusters: matrices with one input share its subspace. At nine in ten or fewer
    # than all, chance is what is seen; a standard error too small by half covers 70 %.
    assert 0.85 * intervals <= covered < intervals


def test_more_text_makes_the_interval_narrower(examples, tokenizer):
    model, params = language_model("llama", tokenizer)
    after = moved(model, params)
    widths = []
    for tokens in (512, 4096):
        rows = RSF(tokens=tokens, resamples=100).measurement(setting(model, params, examples))(after)
        low, high = values(rows, "ratio_low"), values(rows, "ratio_high")
        widths.append(sum(high[name] - low[name] for name in low))
    # Eight times the text: about 1/√8 = 0.35 of the width.
    assert 0.15 < widths[1] / widths[0] < 0.7


def moved(model, params, scale=0.05, seed=0):
    """The weights with Gaussian noise on every matrix."""
    generator = torch.Generator().manual_seed(seed)
    after = params
    for matrix in model.architecture.matrices:
        noise = torch.randn(matrix.of(params).shape, generator=generator)
        after = matrix.replaced(after, matrix.of(params) + scale * noise)
    return dict(after)


def test_the_standard_error_is_that_of_the_bootstrap_and_without_it_there_is_none(examples, tokenizer):
    model, params = language_model("llama", tokenizer)
    rows = RSF().measurement(setting(model, params, examples))(moved(model, params))
    for row in rows:
        if row["quantity"] in ("fraction", "ratio"):
            estimated = row["role"] == "read" and row["subspace"] != "random"
            assert (row["stderr"] is not None and row["stderr"] > 0) == estimated
    rows = RSF(resamples=0).measurement(setting(model, params, examples))(moved(model, params))
    assert not any(row["quantity"] in ("ratio_low", "ratio_high") for row in rows)


@pytest.mark.parametrize("objective", [CE("chosen"), DPO()], ids=["ce", "dpo"])
@pytest.mark.parametrize("name", ["gpt_neox", "olmo2"])
def test_the_matched_level_of_a_write_is_the_share_of_its_upstream_gradients(
    name, objective, examples, tokenizer
):
    model, params = language_model(name, tokenizer)
    at = setting(model, params, examples, objective=objective)
    rows = RSF(prompts=16).measurement(at)(moved(model, params))
    levels = values(rows, "matched_ratio", "prediction")
    (gathered_pass,) = gradient_moments(
        model, params, objective, TRAINING, examples, Gathering(prompts=16), 3
    )
    basis = prediction_frame(at, params, K).space.basis
    for matrix in model.architecture.matrices:
        if matrix.role == "write":
            second = gathered_pass.upstream[matrix.name].value.double()
            if matrix.norm is not None:
                gain = matrix.norm.gain(params).double()
                second = gain[:, None] * second * gain
            expected = float(torch.trace(basis.T @ second @ basis) / second.trace()) * D / K
            assert_close(levels[matrix.name], expected, rtol=1e-5, atol=0)
    assert values(rows, "matched_p_value", "prediction").keys() == levels.keys()
    intervals = (
        values(rows, "matched_ratio_low", "prediction"),
        values(rows, "matched_ratio_high", "prediction"),
    )
    assert all(intervals[0][name] < levels[name] < intervals[1][name] for name in levels)


def test_what_is_written_by_the_objectives_own_gradients_alone_has_its_matched_level(examples, tokenizer):
    model, params = language_model("llama", tokenizer)
    objective = DPO()
    (gathered_pass,) = gradient_moments(
        model, params, objective, TRAINING, examples, Gathering(prompts=40, positions="scored"), 3
    )
    generator = torch.Generator().manual_seed(0)
    after = params
    for matrix in model.architecture.matrices:
        if matrix.role == "write":
            second = gathered_pass.upstream[matrix.name].value.double()
            values_, vectors = torch.linalg.eigh(second)
            root = vectors * values_.clamp(min=0).sqrt()
            d_in = matrix.of(params).shape[1]
            delta = root @ torch.randn(D, d_in, generator=generator, dtype=torch.float64)
            after = matrix.replaced(after, matrix.of(params) + delta.float() / delta.norm())
    at = setting(model, params, examples, objective=objective)
    rows = RSF(prompts=40).measurement(at)(dict(after))
    z, ratio = values(rows, "matched_z", "prediction"), values(rows, "ratio", "prediction")
    # Four draws from the null: |z| beyond 4 has probability 6e-5 each.
    assert len(z) == 4 and all(abs(name) < 4 for name in z.values())
    assert max(abs(ratio[name] - 1) for name in ratio) > 0.3  # the level is not the isotropic one


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
def test_the_trained_level_of_a_read_is_the_share_of_its_inputs_on_the_examples(name, examples, tokenizer):
    model, params = language_model(name, tokenizer)
    at = setting(model, params, examples, objective=DPO())
    rows = RSF(prompts=16).measurement(at)(moved(model, params))
    levels = values(rows, "trained_matched_ratio")
    (gathered_pass,) = gradient_moments(model, params, DPO(), TRAINING, examples, Gathering(prompts=16), 3)
    spaces = {frame.place: frame.space for frame in input_frames(at, params, K, Inputs())}
    inputs: dict[Place, torch.Tensor] = {
        (site.name, site.layer): moment.value.double() for site, moment in gathered_pass.inputs.items()
    }
    reads = [matrix for matrix in model.architecture.matrices if matrix.role == "read"]
    for matrix in reads:
        basis, second = spaces[place_of(matrix)].basis, inputs[place_of(matrix)]
        expected = float(torch.trace(basis.T @ second @ basis) / second.trace()) * D / K
        assert_close(levels[matrix.name], expected, rtol=1e-5, atol=0)
    assert list(levels) == [matrix.name for matrix in reads]
    for quantity in ("p_value", "q_value", "z"):
        assert values(rows, f"trained_matched_{quantity}").keys() == levels.keys()
    low, high = (values(rows, f"trained_matched_ratio_{end}") for end in ("low", "high"))
    assert all(low[name] < levels[name] < high[name] for name in levels)
    unknown = RSF().measurement(setting(model, params, examples))(moved(model, params))
    assert not values(unknown, "trained_matched_ratio")


def test_a_read_of_the_trained_inputs_alone_has_the_level_of_those_and_not_of_the_heldout_text(
    examples, tokenizer
):
    model, params = language_model("llama", tokenizer)
    # The held-out text is one sentence over and over, so that its inputs are not those of the examples.
    other = replace(examples, heldout=[examples.heldout[0]] * 200)
    (gathered_pass,) = gradient_moments(model, params, DPO(), TRAINING, other, Gathering(prompts=40), 3)
    inputs: dict[Place, torch.Tensor] = {
        (site.name, site.layer): moment.root for site, moment in gathered_pass.inputs.items()
    }
    generator = torch.Generator().manual_seed(0)
    after = params
    for matrix in model.architecture.matrices:
        if matrix.role == "read":
            rows = matrix.of(params).shape[0]
            mixed = (
                torch.randn(rows, D, generator=generator, dtype=torch.float64) @ inputs[place_of(matrix)].T
            )
            after = matrix.replaced(after, matrix.of(params) + mixed.float() / mixed.norm())
    at = setting(model, params, other, objective=DPO())
    table = RSF(prompts=40).measurement(at)(dict(after))
    trained, heldout = values(table, "trained_matched_z"), values(table, "matched_ratio")
    ratio = values(table, "ratio")
    # Ten draws from the null: |z| beyond 4 has probability 6e-5 each.
    assert len(trained) == 10 and all(abs(z) < 4 for z in trained.values())
    assert all(heldout[name] > 1.3 * ratio[name] for name in trained)


def test_q_values_are_those_of_benjamini_and_hochberg_over_layers_and_matrices(examples, tokenizer):
    model, params = language_model("llama", tokenizer)
    rows = RSF(k=[2, 4]).measurement(setting(model, params, examples))(moved(model, params))
    for k in (2, 4):
        family = [
            row
            for row in rows
            if row.get("k") == k and row["quantity"] == "p_value" and row["subspace"] != "random"
        ]
        assert len(family) == len(model.architecture.matrices) == 14
        expected = stats.false_discovery_control([row["value"] for row in family])
        q_values = values([row for row in rows if row.get("k") == k], "q_value")
        names = [f"L{row['layer']}.{row['matrix']}" for row in family]
        assert_close([q_values[name] for name in names], expected.tolist())


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gpt2", "phi3"])
def test_heads_have_the_share_of_their_own_rows_or_columns(name, examples, tokenizer):
    model, params = language_model(name, tokenizer)
    after = moved(model, params)
    at = setting(model, params, examples)
    whole, split = (RSF(per_head=heads).measurement(at)(after) for heads in (False, True))
    assert [row for row in split if "head" not in row] == whole
    ratio = values(split, "ratio")
    spaces = {
        frame.place: frame.space
        for frame in [*input_frames(at, params, K, Inputs()), prediction_frame(at, params, K)]
    }
    for matrix in model.architecture.matrices:
        heads = {
            name_of_head: value
            for name_of_head, value in ratio.items()
            if name_of_head.startswith(f"{matrix.name}.")
        }
        if matrix.kind not in ("q", "k", "v", "o"):
            assert not heads
            continue
        assert list(heads) == [f"{matrix.name}.{head}" for head in range(matrix.heads)]
        delta = matrix.of(after) - matrix.of(params)
        parts = delta.chunk(matrix.heads, dim=1 if matrix.kind == "o" else 0)
        for part, value in zip(parts, heads.values(), strict=True):
            x = part if matrix.role == "read" else part.T
            assert_close(value, spaces[place_of(matrix)].relative_fraction(x), rtol=1e-4, atol=1e-5)


def test_a_budget_changes_no_number(examples, tokenizer):
    model, params = language_model("llama", tokenizer)
    after = moved(model, params)
    at = setting(model, params, examples, objective=DPO())
    whole, split = (
        RSF(tokens=1024, prompts=8, budget_gb=budget).measurement(at)(after) for budget in (None, 1e-9)
    )
    assert whole == split


def test_an_unmoved_model_needs_neither_text_nor_gradients(examples, tokenizer, monkeypatch):
    model, params = language_model("llama", tokenizer)
    monkeypatch.setattr(type(model), "logits", None)
    rows = RSF().measurement(setting(model, params, examples, objective=DPO()))(dict(params))
    sizes = {"delta_norm", "moved_share"}
    assert {row["quantity"] for row in rows if "parameter" not in row} == sizes
    assert {row["quantity"] for row in rows} == sizes | {"relative_norm", "visible_share"}


def test_increments_are_what_lies_between_neighbouring_checkpoints(examples, tokenizer):
    model, params = language_model("llama", tokenizer)
    first, two = moved(model, params, seed=1), moved(model, params, seed=2)
    at = setting(model, params, examples, end=two)
    measure = RSF(increments=True, resamples=0).measurement(at)
    plain = RSF(resamples=0).measurement(at)
    for step, (previous, now) in enumerate([(params, params), (params, first), (first, two)]):
        rows = measure(now)
        cumulative = [row for row in rows if not row["quantity"].startswith("increment_")]
        assert cumulative == plain(now)
        if step == 0:
            assert len(rows) == len(cumulative)
            continue
        # Measured from the checkpoint before in the subspaces of the start.
        other = RSF(resamples=0, at="end").measurement(replace(at, start=previous, end=at.start))(now)
        assert values(rows, "increment_ratio") == values(other, "ratio")
        assert values(rows, "increment_norm") == values(other, "delta_norm")
        assert (values(rows, "increment_ratio") == values(rows, "ratio")) == (step == 1)

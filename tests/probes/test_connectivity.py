from copy import deepcopy
from math import sqrt

import pytest
import torch
from moving import matrix_of, moved
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from weightgeom.estimators.held_out import held_out, predictions
from weightgeom.probes.behaviour import Behaviour
from weightgeom.probes.connectivity import Connectivity, barrier, random_direction
from weightgeom.table import tabulate
from weightgeom.text.tokens import packed

PROBE = Connectivity(t=[0, 0.5, 1, 1.5], draws=2, tokens=200)


@pytest.fixture
def after(params, generator):
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in params.items()
    }


def by_dose(rows, quantity):
    return {row["dose"]: row["value"] for row in rows if row["quantity"] == quantity}


def test_the_ends_of_the_path_have_the_loss_and_the_kl_of_the_two_models(params, after, at):
    rows = PROBE.measurement(at(params))(after)
    table = tabulate([row | {"step": 1} for row in rows])
    assert set(table["unit"]) == {"nats/token"} and min(table["n"]) > 1
    loss, kl = by_dose(rows, "path_ce"), by_dose(rows, "path_kl")
    assert list(loss) == ["0", "0.5", "1", "1.5"]
    measure = Behaviour(tokens=200).measurement(at(params))
    for dose, weights in (("0", params), ("1", after)):
        expected = {row["quantity"]: row["value"] for row in measure(weights)}
        assert loss[dose] == expected["heldout_ce"] and kl[dose] == expected["kl_from_base"]
    for quantity in ("path_ce", "path_kl"):
        null = by_dose(rows, f"null_{quantity}_mean")
        assert null["0"] == by_dose(rows, quantity)["0"]
        assert by_dose(rows, f"null_{quantity}_sd")["0"] == 0 < by_dose(rows, f"null_{quantity}_sd")["1"]
    rise = by_dose(rows, "path_ce_rise")
    assert rise["0"] == 0 and rise["1"] == pytest.approx(loss["1"] - loss["0"])
    value_of = {row["quantity"]: row["value"] for row in rows}
    assert value_of["barrier"] == max(0, loss["0.5"] - (loss["0"] + loss["1"]) / 2)


def test_the_loss_on_the_way_is_that_of_a_network_with_these_weights(model, examples, params, after, at):
    network = deepcopy(model.network)
    network.load_state_dict({name: 0.5 * (params[name] + after[name]) for name in params}, strict=False)
    losses, count = 0.0, 0
    for batch in packed(examples.heldout, model.tokenizer, 96, 200):
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            ids = ids[mask.bool()]
            losses += float(cross_entropy(network(ids[None]).logits[0, :-1], ids[1:], reduction="sum"))
            count += len(ids) - 1
    rows = PROBE.measurement(at(params))(after)
    assert_close(by_dose(rows, "path_ce")["0.5"], losses / count, rtol=1e-5, atol=0)


def test_a_barrier_is_the_most_that_the_loss_exceeds_the_line():
    # At 0.5 the line is at 2: 3.5 exceeds it by 1.5. Behind 1 there is no line.
    assert barrier([0.0, 0.25, 0.5, 1.0, 2.0], [1.0, 1.0, 3.5, 3.0, 99.0]) == 1.5
    assert barrier([0.0, 0.5, 1.0], [3.0, 1.0, 1.0]) == 0


def test_a_random_direction_has_the_norm_of_the_update_in_every_matrix(model, params, generator):
    deltas = {
        name: size * torch.randn(matrix_of(model, name).of(params).shape, generator=generator)
        for name, size in (("L0.q", 0.1), ("L0.k", 0.2), ("L1.down", 0.3))
    }
    after = moved(model, params, deltas)
    direction = random_direction(model.architecture, params, after, generator)
    for matrix in model.architecture.matrices:
        update = matrix.of(after) - matrix.of(params)
        assert_close(matrix.of(direction).norm(), update.norm(), rtol=1e-5, atol=1e-7)
    assert not direction[model.architecture.embed].any()
    update = deltas["L1.down"].flatten()
    cosine = torch.cosine_similarity(matrix_of(model, "L1.down").of(direction).flatten(), update, dim=0)
    assert abs(cosine) < 5 / sqrt(len(update))


@pytest.mark.slow
def test_the_loss_in_a_random_direction_is_a_draw_from_its_null(model, examples, params, after, generator):
    batches = packed(examples.heldout, model.tokenizer, 48, 96)
    then = [predictions(model, params, batch) for batch in batches]

    def losses(directions):
        sums = []
        for direction in directions:
            weights = {name: params[name] + direction[name] for name in params}
            sums.append(float(held_out(model, weights, then, batches).losses.sum()))
        return torch.tensor(sums, dtype=torch.float64)

    # Updates of Gaussian entries, each against the random directions of its own norms.
    updates = [{name: 0.05 * torch.randn(value.shape, generator=generator) for name, value in params.items()}
               for _ in range(500)]  # fmt: skip
    drawn = losses(updates)
    null = losses(
        random_direction(
            model.architecture, params, {name: params[name] + update[name] for name in params}, generator
        )
        for update in updates
    )
    rejected = float((drawn > null.quantile(0.95)).double().mean())
    assert abs(rejected - 0.05) < 3 * sqrt(2 * 0.05 * 0.95 / 500)
    assert abs(float(drawn.mean() - null.mean())) < 4 * float(null.std()) * sqrt(2 / 500)


def test_a_checkpoint_that_is_the_start_has_no_rows(params, at):
    assert PROBE.measurement(at(params))(params) == []


def test_a_path_without_its_ends_is_refused():
    with pytest.raises(ValueError, match="must include 0 and 1"):
        Connectivity(t=[0.5, 1])


def test_the_summary_and_the_figure_show_every_t(params, after, at, tmp_path):
    from weightgeom.figures.base import save

    table = tabulate([row | {"step": 1} for row in PROBE.measurement(at(params))(after)])
    shown = PROBE.summary(table)
    assert list(shown["t"]) == ["0", "0.5", "1", "1.5"]
    (figure,) = PROBE.figures({"training": table}).values()
    save(figure, tmp_path / "paths.png")
    assert (tmp_path / "paths.png").stat().st_size > 10_000
    assert PROBE.figures({"pretraining": table}) == {}

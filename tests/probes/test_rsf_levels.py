"""Matched levels of reads (cross-fitting, adapters, few tokens), and increments of writes."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from weightgeom.estimators.moments import Moment
from weightgeom.estimators.reference_subspaces import Inputs, input_frames
from weightgeom.geometry.subspace import Subspace
from weightgeom.interfaces import Setting
from weightgeom.models.adapters import Adapted, LowRank
from weightgeom.probes.rsf import RSF


def values(rows, quantity, name, k=None) -> list[float]:
    """A quantity of one matrix in its own subspace."""
    return [
        row["value"]
        for row in rows
        if row["quantity"] == quantity
        and f"L{row['layer']}.{row['matrix']}" == name
        and row.get("subspace") != "random"
        and (k is None or row["k"] == k)
    ]


def noisy(model, params, generator, scale=0.1):
    after = params
    for matrix in model.architecture.matrices:
        weight = matrix.of(params)
        after = matrix.replaced(after, weight + scale * torch.randn(weight.shape, generator=generator))
    return after


def test_subspace_and_level_of_the_crossfit_come_from_different_halves(model, params, at, generator):
    after, setting = noisy(model, params, generator), at(params)
    rows = RSF(k=4).measurement(setting)(after)
    (frame,) = [
        frame for frame in input_frames(setting, params, 4, Inputs(resamples=40))
        if frame.place == ("attention_input", 1)
    ]  # fmt: skip
    matrix = next(matrix for matrix in model.architecture.matrices if matrix.name == "L1.k")
    delta = (matrix.of(after) - matrix.of(params)).double()
    assert isinstance(frame.moment, Moment)
    sums, middle = frame.moment.sums.double(), len(frame.moment.sums) // 2
    halves = sums[:middle].sum(0), sums[middle:].sum(0)
    spaces = [Subspace.top(half, 4) for half in halves]
    inside = sum(space.relative_fraction(delta) for space in spaces) / 2
    level = sum(space.explained(other) for space, other in zip(spaces, halves[::-1], strict=True)) / 2
    d = len(halves[0])
    assert_close(values(rows, "crossfit_ratio", "L1.k"), [inside], rtol=1e-4, atol=0)
    assert_close(values(rows, "crossfit_matched_ratio", "L1.k"), [level * d / 4], rtol=1e-4, atol=0)
    (own,) = values(rows, "matched_ratio", "L1.k")
    assert own > values(rows, "crossfit_matched_ratio", "L1.k")[0]  # of the text that it was estimated from


def test_writes_have_no_crossfit(model, params, at, generator):
    rows = RSF().measurement(at(params))(noisy(model, params, generator))
    assert not values(rows, "crossfit_ratio", "L0.o") and not values(rows, "adapter_ratio", "L0.o")


def test_reads_of_an_adapter_are_compared_with_its_row_space(model, params, at, generator):
    name = next(matrix.parameter for matrix in model.architecture.matrices if matrix.name == "L0.up")
    d_out, d = params[name].shape
    a = torch.randn(3, d, generator=generator)
    b = 0.1 * torch.randn(d_out, 3, generator=generator)
    after = Adapted(params, {name: LowRank(b, a)}, {}, frozenset())
    rows = RSF(k=4).measurement(at(params))(after)
    assert values(rows, "adapter_rank", "L0.up") == [3]
    (frame,) = [
        frame for frame in input_frames(at(params), params, 4, Inputs()) if frame.place == ("mlp_input", 0)
    ]
    gram = a.double().T @ a.double()
    assert frame.moment is not None
    assert_close(
        values(rows, "adapter_ratio", "L0.up"), [frame.space.explained(gram) * d / 4], rtol=1e-4, atol=0
    )
    seen = gram @ frame.moment.value.double() @ gram
    expected = float(frame.space.shares(seen).sum()) * d / 4  # tr(Uᵀ Q C Q U) / tr(Q C Q)
    assert_close(values(rows, "matched_ratio", "L0.up"), [expected], rtol=1e-4, atol=0)
    assert 0 < values(rows, "adapter_p_value", "L0.up")[0] <= 1
    plain = RSF(k=4).measurement(at(params))(dict(after))  # the same weights, merged
    assert not values(plain, "adapter_rank", "L0.up")


def test_few_tokens_are_said_and_counted(model, params, examples, generator, caplog):
    few = replace(examples, heldout=examples.heldout[:3])
    rows = RSF().measurement(Setting(model, params, params, False, few, 3))(noisy(model, params, generator))
    (per, *_) = [row for row in rows if row["quantity"] == "tokens_per_dimension"]
    assert per["value"] == per["n"] / model.architecture.d_model
    assert "too few tokens for the subspaces of the inputs" in caplog.text
    assert f"{per['n']} tokens of held-out text, of 8192 asked for" in caplog.text


def test_a_text_of_one_word_has_fewer_directions_than_asked_for(model, params, examples, generator, caplog):
    word = examples.heldout[0].split()[0]
    same = replace(examples, heldout=[" ".join([word] * 40)] * 4)
    setting = Setting(model, params, params, False, same, 3)
    rows = RSF(k=[4, 16], resamples=0).measurement(setting)(noisy(model, params, generator))
    (frame,) = [
        frame for frame in input_frames(setting, params, 16, Inputs(tokens=8192))
        if frame.place == ("attention_input", 0)
    ]  # fmt: skip
    assert frame.rank is not None and frame.rank < 16
    assert values(rows, "directions", "L0.q", 16) == [frame.rank]
    assert f"has only {frame.rank} directions, fewer than k = 16" in caplog.text
    ratios = values(rows, "ratio", "L0.q", 16)
    assert len(ratios) == 1 and 0 <= ratios[0] <= model.architecture.d_model / frame.rank


@pytest.mark.parametrize("from_random", [True, False])
def test_increments_of_a_pretraining_are_written_into_the_subspace_before(
    model, params, examples, from_random
):
    unembedding = params["lm_head.weight"]
    matrix = next(matrix for matrix in model.architecture.matrices if matrix.name == "L1.down")
    first = {**params, "lm_head.weight": torch.roll(unembedding, 1, 1)}  # another prediction subspace
    setting = Setting(model, params, first, from_random, examples, 3)
    measure = RSF(k=4, resamples=0).measurement(setting)
    measure(params)
    measure(first)
    gain = first["gpt_neox.final_layer_norm.weight"].double()
    rows = first["lm_head.weight"].double() * gain
    space = Subspace.top((rows - rows.mean(0)).T @ (rows - rows.mean(0)), 4)
    inside = space.basis @ torch.randn(4, matrix.of(first).shape[1], dtype=torch.float64)
    after = matrix.replaced(first, matrix.of(first) + inside.float())
    ratios = values(measure(after), "forward_increment_ratio", "L1.down")
    if not from_random:
        assert not ratios
        return
    assert ratios == pytest.approx([model.architecture.d_model / 4], rel=1e-3)  # all of it

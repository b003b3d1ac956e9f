import pytest
import torch
from moving import matrix_of, moved
from networks import FORMS, language_model
from torch.testing import assert_close

from weightgeom.causal.edits import Surgery, Transplant, inside, residual_side
from weightgeom.geometry.subspace import Subspace


def pair(name, tokenizer, generator):
    """A random model of an architecture, its matrices, its weights, and others where all of these moved."""
    model, start = language_model(name, tokenizer)
    end = {key: weight + torch.randn(weight.shape, generator=generator) / 50 for key, weight in start.items()}
    return model.architecture.matrices, start, end


def space_of(generator, k=4):
    basis = Subspace.random(32, k, generator).basis
    return lambda _: basis


def same(weights, other_weights):
    return weights.keys() == other_weights.keys() and all(
        torch.equal(weights[name], other_weights[name]) for name in weights
    )


def test_surgery_splits_an_update_along_an_axis(model, params) -> None:
    # dW = [[1, 2, 0, ...]] in the first row; inside the first axis lies its 1, outside its 2.
    k = matrix_of(model, "L0.k")
    delta = torch.zeros(32, 32)
    delta[0, :2] = torch.tensor([1.0, 2.0])
    end = moved(model, params, {"L0.k": delta})
    axis = torch.eye(32, dtype=torch.float64)[:, :1]
    edited = Surgery(params, [k], lambda _: axis, inside=0.0, outside=1.0).applied(end)
    assert_close((k.of(edited) - k.of(params))[0, :2], torch.tensor([0.0, 2.0]))
    edited = Surgery(params, [k], lambda _: axis, inside=3.0, outside=0.5).applied(end)
    assert_close((k.of(edited) - k.of(params))[0, :2], torch.tensor([3.0, 1.0]))


def test_a_shorter_direction_is_scaled_in_part(model, params) -> None:
    # b of length 1/2 adds b bᵀ = 1/4 of the axis, so that removing leaves 3/4 of what it holds.
    o = matrix_of(model, "L1.o")
    end = moved(model, params, {"L1.o": torch.ones(32, 32)})
    axis = torch.eye(32, dtype=torch.float64)[:, :1] / 2
    change = o.of(Surgery(params, [o], lambda _: axis, 0.0, 1.0).applied(end)) - o.of(params)
    assert_close(change[0], torch.full((32,), 0.75))
    assert_close(change[1:], torch.ones(31, 32))


@pytest.mark.parametrize("name", FORMS)
def test_surgery_that_leaves_both_parts_gives_the_end_and_that_leaves_none_the_start(
    name, tokenizer, generator
) -> None:
    matrices, start, end = pair(name, tokenizer, generator)
    space = space_of(generator)
    whole = Surgery(start, matrices, space, 1.0, 1.0).applied(end)
    none = Surgery(start, matrices, space, 0.0, 0.0).applied(end)
    for matrix in matrices:
        # In fp64 the sum of an update's parts is that update to 1e-15, which rounds to what is stored.
        assert_close(matrix.of(whole), matrix.of(end), rtol=2e-7, atol=1e-9)
        assert torch.equal(matrix.of(none), matrix.of(start))


@pytest.mark.parametrize("name", FORMS)
def test_what_surgery_removes_and_what_it_keeps_add_up_to_the_update(name, tokenizer, generator) -> None:
    matrices, start, end = pair(name, tokenizer, generator)
    space = space_of(generator)
    removed, kept = (Surgery(start, matrices, space, i, 1 - i).applied(end) for i in (0.0, 1.0))
    for matrix in matrices:
        assert_close(
            matrix.of(removed) + matrix.of(kept), matrix.of(start) + matrix.of(end), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("name", FORMS)
def test_what_surgery_keeps_reaches_the_stream_only_inside(name, tokenizer, generator) -> None:
    matrices, start, end = pair(name, tokenizer, generator)
    space = space_of(generator)
    edited = Surgery(start, matrices, space, 1.0, 0.0).applied({**end})
    for matrix in matrices:
        side = residual_side(matrix, matrix.of(edited) - matrix.of(start), end)
        assert_close(
            Subspace(space(matrix)).fraction(side), 1.0, rtol=0, atol=1e-6
        )  # fp32 rounding of weights


@pytest.mark.parametrize("name", FORMS)
def test_edits_mutate_nothing_and_change_only_their_matrices(name, tokenizer, generator) -> None:
    matrices, start, end = pair(name, tokenizer, generator)
    copies = [{key: weight.clone() for key, weight in params.items()} for params in (start, end)]
    chosen = [matrix for matrix in matrices if matrix.kind in ("k", "down")]
    surgery = Surgery(start, chosen, space_of(generator), 0.0, 1.0).applied(end)
    transplant = Transplant(end, chosen).applied(start)
    assert same(start, copies[0]) and same(end, copies[1])
    for before, edited in ((end, surgery), (start, transplant)):
        for matrix in matrices:
            assert torch.equal(matrix.of(edited), matrix.of(before)) == (matrix not in chosen)
        stored = {matrix.parameter for matrix in chosen}
        assert all(edited[key] is before[key] for key in before if key not in stored)


@pytest.mark.parametrize("name", FORMS)
def test_transplants_of_reads_and_of_writes_together_are_the_end(name, tokenizer, generator) -> None:
    matrices, start, end = pair(name, tokenizer, generator)
    for role in ("read", "write"):
        start = Transplant(end, [matrix for matrix in matrices if matrix.role == role]).applied(start)
    assert all(torch.equal(matrix.of(start), matrix.of(end)) for matrix in matrices)


@pytest.mark.parametrize("name", FORMS)
def test_a_turned_update_keeps_its_singular_values_and_its_other_side(name, tokenizer, generator) -> None:
    matrices, start, end = pair(name, tokenizer, generator)
    rotation = Subspace.random(32, 32, generator).basis
    edited = Transplant(end, matrices, lambda _: rotation).applied(start)
    for matrix in matrices:
        delta, turned = (matrix.of(params).double() - matrix.of(start) for params in (end, edited))
        # fp32 rounds weights of 1 at 6e-8, in updates whose singular values are 0.1.
        assert_close(torch.linalg.svdvals(turned), torch.linalg.svdvals(delta), rtol=0, atol=2e-6)
        other = (lambda x: x @ x.T) if matrix.role == "read" else (lambda x: x.T @ x)
        assert_close(other(turned), other(delta), rtol=0, atol=2e-6)


def test_a_turned_update_reads_and_writes_the_axis_that_its_own_is_turned_to(model, params) -> None:
    # R takes axis 0 to axis 1, 1 to 2 and 2 to 0.
    rotation = torch.eye(32)
    rotation[:3, :3] = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    k, o = matrix_of(model, "L0.k"), matrix_of(model, "L0.o")
    delta = torch.zeros(32, 32)
    delta[0, 5] = 1.0
    end = moved(model, params, {"L0.k": delta.T, "L0.o": delta})
    edited = Transplant(end, [k, o], lambda _: rotation).applied(params)
    for matrix, place in ((k, (5, 1)), (o, (1, 5))):
        change = matrix.of(edited) - matrix.of(params)
        assert_close(change[place], torch.tensor(1.0))
        assert int(change.count_nonzero()) == 1


def test_a_transplant_of_all_weights_is_the_end(model, tokenizer, generator) -> None:
    matrices, start, end = pair("gpt2", tokenizer, generator)
    assert same(dict(Transplant(end, matrices, others=True).applied(start)), end)
    turned = Transplant(end, matrices, lambda _: torch.eye(32).flip(0), others=True).applied(start)
    stored = {matrix.parameter for matrix in matrices}
    for key, weight in end.items():
        assert torch.equal(turned[key], weight) == (key not in stored)


def test_no_subspace_is_behind_a_gain_of_zero(tokenizer) -> None:
    model, params = language_model("olmo2", tokenizer)
    down = matrix_of(model, "L0.down")
    assert down.norm is not None
    params[down.norm.parameter] = torch.zeros(32)
    with pytest.raises(ValueError, match=r"the norm behind L0[.]down has a gain of zero"):
        inside(down, down.of(params), torch.eye(32)[:, :1], params)

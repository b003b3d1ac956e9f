import numpy as np
import pytest
import torch
from moving import matrix_of
from networks import language_model
from safetensors.torch import save_file
from scipy import stats
from torch.testing import assert_close

from weightgeom.causal.directions import (
    Control,
    Directions,
    check_direction,
    from_file,
    haar,
    signed,
    top_pair,
    unit,
)
from weightgeom.geometry.subspace import Subspace

D, K = 32, 5


@pytest.fixture
def axes(model, generator):
    """Random axes at every place of the model."""
    places = [(site.name, site.layer) for site in model.architecture.sites] + [("prediction", None)]
    return {place: Subspace(torch.linalg.qr(_noise(generator, D, D)).Q) for place in places}


@pytest.fixture
def directions(axes):
    return Directions(axes, K, seed=0)


def _noise(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", ["L0.q", "L1.k", "L1.v", "L1.up"])
def test_the_activation_direction_is_the_top_direction_of_what_the_block_reads(name, model, axes, directions):
    matrix = matrix_of(model, name)
    block = "mlp_input" if matrix.kind == "up" else "attention_input"
    vector, partner = directions.named("activation", matrix, {}, {})
    assert vector.equal(axes[block, matrix.layer].basis[:, 0]) and partner is None


@pytest.mark.parametrize(("name", "block"), [("L1.o", "attention_input"), ("L0.down", "mlp_input")])
def test_the_activation_direction_of_a_matrix_that_writes_is_its_own_blocks(
    name, block, model, axes, directions
):
    matrix = matrix_of(model, name)
    assert directions.named("activation", matrix, {}, {})[0].equal(axes[block, matrix.layer].basis[:, 0])


@pytest.mark.parametrize("name", ["L0.q", "L1.o"])
def test_the_prediction_direction_is_the_top_direction_of_the_unembedding(name, model, axes, directions):
    vector, partner = directions.named("prediction", matrix_of(model, name), {}, {})
    assert vector.equal(axes["prediction", None].basis[:, 0]) and partner is None


@pytest.mark.parametrize("name", ["gradient", "delta"])
@pytest.mark.parametrize("where", ["L0.q", "L1.o", "L1.down"])
@pytest.mark.parametrize("network", ["gpt_neox", "gpt2", "phi3", "llama"])
def test_gradient_and_delta_are_the_planted_top_singular_pair(
    name, where, network, tokenizer, generator, axes
):
    model, params = language_model(network, tokenizer)
    matrix = matrix_of(model, where)
    out, into = matrix.of(params).shape
    u, v = unit(_noise(generator, out), "u"), unit(_noise(generator, into), "v")
    planted = matrix.replaced(params, (3 * torch.outer(u, v)).float())
    given = ({}, planted) if name == "delta" else (planted, {})
    vector, partner = Directions(axes, K, 0).named(name, matrix, *given)
    assert partner is not None
    pair = (partner, vector) if matrix.role == "read" else (vector, partner)
    sign = torch.sign(pair[0] @ u)
    # The planted matrix is stored in fp32.
    assert_close((sign * pair[0], sign * pair[1]), (u, v), rtol=0, atol=1e-6)


def test_the_top_pair_is_that_of_the_singular_value_decomposition_with_a_definite_sign(model, generator):
    matrix = matrix_of(model, "L0.up")
    for _ in range(20):
        x = _noise(generator, 48, D)
        u, s, vt = torch.linalg.svd(x)
        left, right = top_pair(matrix.replaced({matrix.parameter: x}, x), matrix, "gradient")
        assert_close(left @ x @ right, s[0], rtol=1e-10, atol=0)  # positive: along it a behaviour grows
        assert_close(torch.outer(left, right), torch.outer(u[:, 0], vt[0]), rtol=0, atol=1e-6)
        assert right[right.abs().argmax()] > 0


def test_a_vector_from_a_file_is_the_direction_whatever_its_length(model, directions, tmp_path, generator):
    vector, matrix = _noise(generator, D), matrix_of(model, "L1.o")
    np.save(tmp_path / "x.npy", 5 * vector.float().numpy())
    save_file({"any": (3 * vector).to(torch.bfloat16)}, tmp_path / "one.safetensors")
    save_file({"L0.o": torch.ones(D), "L1.o": vector}, tmp_path / "each.safetensors")
    # To the precision of each dtype.
    for name, tolerance in (("x.npy", 1e-7), ("one.safetensors", 4e-3), ("each.safetensors", 1e-15)):
        path = str(tmp_path / name)
        check_direction(path, matrix, D)
        direction, partner = directions.named(path, matrix, {}, {})
        assert partner is None and direction.dtype == torch.float64
        assert_close(direction, vector / vector.norm(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["random", "bottom", "orthogonal", "within"])
@pytest.mark.parametrize("name", ["L1.k", "L1.up", "L1.o"])
def test_controls_are_unit_vectors_that_lie_where_they_should(kind, name, model, axes, directions):
    matrix = matrix_of(model, name)
    place = {"k": ("attention_input", 1), "up": ("mlp_input", 1), "o": ("prediction", None)}[matrix.kind]
    basis = axes[place].basis
    draws = torch.stack([directions.control(kind, matrix, draw) for draw in range(6)])
    assert_close(draws.norm(dim=1), torch.ones(6, dtype=torch.float64))
    share = (draws @ basis[:, :K]).square().sum(1)
    if kind == "bottom":
        assert draws.T.equal(basis.flip(1)[:, :6])
    if kind == "within":
        assert_close(share, torch.ones_like(share))
    if kind == "orthogonal":
        assert_close(share, torch.zeros_like(share), rtol=0, atol=1e-28)
    if kind == "random":
        assert ((share > 1e-4) & (share < 0.9)).all()
    assert (draws @ draws.T).tril(-1).abs().max() < 1 - 1e-6  # no two alike


def test_random_directions_are_made_by_seed_matrix_kind_and_draw(model, axes):
    def drawn(seed=0, name="L0.k", kind: Control = "random", draw=0):
        return Directions(axes, K, seed).control(kind, matrix_of(model, name), draw)

    assert drawn().equal(drawn())
    others = [drawn(seed=1), drawn(name="L1.k"), drawn(kind="orthogonal"), drawn(draw=1)]
    treatment = Directions(axes, K, 0).named("random", matrix_of(model, "L0.k"), {}, {})[0]
    assert all((drawn() - other).norm() > 0.1 for other in [*others, treatment])


@pytest.mark.parametrize("kind", ["random", "within", "orthogonal"])
def test_drawn_directions_are_uniform_on_their_sphere(kind, model, axes):
    directions, matrix = Directions(axes, K, 7), matrix_of(model, "L0.q")
    dimension = {"random": D, "within": K, "orthogonal": D - K}[kind]
    axis = axes["attention_input", 0].basis[:, K if kind == "orthogonal" else 0]
    # Squared coordinates of a uniform unit vector of n dimensions are Beta(1/2, (n - 1)/2).
    squares = [float(directions.control(kind, matrix, draw) @ axis) ** 2 for draw in range(1000)]
    assert stats.kstest(squares, stats.beta(0.5, (dimension - 1) / 2).cdf).pvalue > 0.01
    signs = sum(float(directions.control(kind, matrix, draw) @ axis) > 0 for draw in range(1000))
    assert abs(signs - 500) < 5 * 250**0.5  # five standard deviations of a binomial


def test_signs_are_made_definite_by_the_largest_entry():
    basis = torch.tensor([[0.6, -0.8], [-0.8, -0.6]])
    # Largest entries: -0.8 of the first column, -0.8 of the second
    assert_close(signed(basis), torch.tensor([[-0.6, 0.8], [0.8, 0.6]]))


def test_a_unit_vector_is_the_vector_over_its_norm():
    # ‖(3, 4)‖ = 5
    assert_close(unit(torch.tensor([3.0, 4.0]), "x"), torch.tensor([0.6, 0.8], dtype=torch.float64))
    assert haar(7, "a").equal(haar(7, "a")) and not haar(7, "a").equal(haar(7, "b"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(D), "is zero: it has no direction"),
        (torch.full((D,), float("nan")), "is not finite: it has no direction"),
        (torch.cat([torch.ones(D - 1), torch.tensor([float("inf")])]), "is not finite: it has no direction"),
        (torch.ones(D + 1), rf"has shape \(33,\), and the residual stream that L0\.k reads is {D} wide"),
        (torch.ones(D, 1), rf"has shape \(32, 1\), and the residual stream that L0\.k reads is {D} wide"),
        (torch.tensor(1.0), r"has shape \(\), and the residual stream"),
    ],
)
def test_a_vector_that_is_no_direction_of_the_stream_is_refused(value, message, model, tmp_path):
    np.save(tmp_path / "x.npy", value.numpy())
    save_file({"x": value}, tmp_path / "x.safetensors")
    for path in (tmp_path / "x.npy", tmp_path / "x.safetensors"):
        with pytest.raises(ValueError, match=rf"the direction in .*{path.name} {message}"):
            check_direction(str(path), matrix_of(model, "L0.k"), D)


def test_the_refusal_of_a_vector_that_does_not_fit_says_who_writes(model, tmp_path):
    np.save(tmp_path / "x.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"the residual stream that L1\.o writes is 32 wide"):
        check_direction(str(tmp_path / "x.npy"), matrix_of(model, "L1.o"), D)


@pytest.mark.parametrize("name", ["actvation", "none.npy", "none.safetensors", "/", "there.txt", "x.npy/"])
def test_a_name_that_there_is_not_is_refused_with_those_that_there_are(name, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.txt").write_text("1")
    message = r"no direction '.+': give one of activation, prediction, gradient, delta, random, or a \.npy or"
    with pytest.raises(ValueError, match=message):
        check_direction(name, matrix_of(model, "L0.k"), D)


@pytest.mark.parametrize("tensors", [{}, {"a": torch.ones(D), "b": torch.ones(D)}])
def test_a_file_of_several_tensors_or_none_must_name_the_matrix(tensors, model, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors")
    message = (
        rf"x\.safetensors cannot be used: it holds \[{', '.join(map(repr, tensors))}\], and none is named"
    )
    with pytest.raises(ValueError, match=rf"{message} L0\.k"):
        check_direction(str(tmp_path / "x.safetensors"), matrix_of(model, "L0.k"), D)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a file of tensors"])
def test_a_file_that_cannot_be_read_is_refused(suffix, content, model, tmp_path):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"the direction in .*x\..* cannot be used: ."):
        from_file(path, matrix_of(model, "L0.k"))


def test_a_file_of_text_is_refused(model, tmp_path):
    np.save(tmp_path / "x.npy", np.array(["a"] * D))
    with pytest.raises(ValueError, match=r"the direction in .*x\.npy cannot be used: ."):
        from_file(tmp_path / "x.npy", matrix_of(model, "L0.k"))


@pytest.mark.parametrize(
    ("value", "problem"), [(0.0, "zero"), (float("inf"), "not finite"), (float("nan"), "not finite")]
)
def test_a_gradient_or_update_without_direction_has_no_top_pair(value, problem, model, params, directions):
    matrix = matrix_of(model, "L1.o")
    nothing = matrix.replaced(params, torch.full((D, D), value))
    with pytest.raises(ValueError, match=rf"the delta of L1\.o is {problem}: it has no top singular pair"):
        directions.named("delta", matrix, {}, nothing)
    with pytest.raises(ValueError, match=rf"the gradient of L1\.o is {problem}: it has no top singular pair"):
        directions.named("gradient", matrix, nothing, {})

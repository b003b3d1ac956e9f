import subprocess
import sys
from functools import cache

import pytest
import torch
from networks import CONFIGS, FORMS
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from weightgeom.estimators import updates as update
from weightgeom.estimators.updates import head_updates, projected, update_of
from weightgeom.geometry.subspace import Subspace
from weightgeom.models.residual import ResidualMatrix, architecture_of
from weightgeom.models.weights import open_params

SINGLE = ResidualMatrix(0, "q", "q", heads=2)
WRITE = ResidualMatrix(0, "o", "o", heads=2)


@cache
def pair(name):
    """An architecture and the weights of two random models of it, norms included."""
    config = CONFIGS[name](50, 16)
    names = AutoModelForCausalLM.from_config(config).named_parameters()
    shapes = {name: parameter.shape for name, parameter in names}
    generator = torch.Generator().manual_seed(0)
    before, after = ({n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(2))
    return architecture_of(config), after, before


@pytest.fixture(params=FORMS)
def case(request):
    return pair(request.param)


@pytest.fixture(params=[4, 100, 2**21])
def block(request, monkeypatch):
    """Blocks of one row, of several and of all rows."""
    monkeypatch.setattr(update, "BLOCK", request.param)


def stream_side(matrix, delta):
    return delta if matrix.role == "read" else delta.T


def dense(matrix, after, before, written=True):
    take = matrix.written if written else matrix.of
    return take(after).double() - take(before).double()


def close(actual, expected):
    # float32 entries of order one, summed over at most 72 terms
    assert_close(actual.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("written", [True, False])
def test_the_gram_matrix_is_that_of_the_dense_update(case, block, written):
    architecture, after, before = case
    for matrix in architecture.matrices:
        update = update_of(matrix, after, before, written=written)
        delta = dense(matrix, after, before, written)
        x = stream_side(matrix, delta)
        close(update.gram, x.T @ x)
        assert update.shape == delta.shape and update.moved_share == 1
        assert update.norm == pytest.approx(delta.norm().item(), rel=1e-5)


def test_the_gram_matrices_of_the_heads_are_those_of_their_rows_or_columns_and_add_up(case, block):
    architecture, after, before = case
    for matrix in (m for m in architecture.matrices if m.kind in ("q", "k", "v", "o")):
        heads = list(head_updates(matrix, after, before))
        assert len(heads) == matrix.heads
        whole = update_of(matrix, after, before)
        assert_close(sum(head.gram for head in heads), whole.gram, rtol=1e-4, atol=1e-3)
        delta = dense(matrix, after, before)
        x = stream_side(matrix, delta).unflatten(0, (matrix.heads, -1))
        for head, rows in zip(heads, x, strict=True):
            close(head.gram, rows.T @ rows)
            assert head.shape[0] * head.shape[1] * matrix.heads == delta.numel()


def test_projections_are_those_of_the_dense_update(case, block, generator):
    architecture, after, before = case
    for matrix in architecture.matrices:
        delta = dense(matrix, after, before)
        left = Subspace.random(delta.shape[0], 3, generator)
        right = Subspace.random(delta.shape[1], 5, generator)
        projections = projected(matrix, after, before, right=right.basis, left=left.basis)
        assert projections.norm == pytest.approx(delta.norm().item(), rel=1e-5)
        assert projections.right == pytest.approx(right.fraction(delta), rel=1e-4)
        assert projections.left == pytest.approx(left.fraction(delta.T), rel=1e-4)


def test_the_share_of_the_gram_matrix_inside_a_subspace_is_the_fraction_of_the_update(case, generator):
    architecture, after, before = case
    space = Subspace.random(architecture.d_model, 4, generator)
    for matrix in architecture.matrices:
        x = stream_side(matrix, dense(matrix, after, before))
        gram = update_of(matrix, after, before).gram
        assert space.explained(gram) == pytest.approx(space.fraction(x), rel=1e-4)


@pytest.mark.parametrize("new", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("old", [torch.float32, torch.bfloat16, torch.float16])
def test_every_mixture_of_stored_dtypes_is_subtracted_in_float32(tmp_path, new, old):
    architecture, after, before = pair("olmo2")
    for directory, params, dtype in (("after", after, new), ("before", before, old)):
        (tmp_path / directory).mkdir()
        stored = {name: tensor.to(dtype) for name, tensor in params.items()}
        save_file(stored, tmp_path / directory / "model.safetensors")
    stored_after, stored_before = (open_params(tmp_path / d, architecture) for d in ("after", "before"))
    for matrix in architecture.matrices[:7]:
        delta = matrix.written(stored_after).float() - matrix.written(stored_before).float()
        if matrix.norm is None:
            delta = matrix.of(stored_after).float() - matrix.of(stored_before).float()
        x = stream_side(matrix, delta.double())
        update = update_of(matrix, stored_after, stored_before)
        assert update.gram.dtype == torch.float32
        close(update.gram, x.T @ x)


def test_an_update_of_float64_weights_is_measured_in_float64():
    after, before = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    gram = update_of(SINGLE, {"q.weight": after}, {"q.weight": before}).gram
    assert_close(gram, (after - before).T @ (after - before), rtol=1e-12, atol=1e-12)


def test_a_small_update_of_bfloat16_weights_is_not_rounded_to_bfloat16():
    # 1 - 1.5 · 2⁻¹² has 13 significant bits, bfloat16 keeps 8
    after, before = torch.tensor([[1.0]]).bfloat16(), torch.tensor([[1.5 * 2**-12]]).bfloat16()
    update = update_of(SINGLE, {"q.weight": after}, {"q.weight": before})
    assert update.norm == pytest.approx(1 - 1.5 * 2**-12, rel=1e-7)


def test_an_identical_matrix_has_not_moved_even_behind_a_norm():
    architecture, after, _ = pair("olmo2")
    for matrix in architecture.matrices:
        update = update_of(matrix, after, after)
        assert update.norm == 0 and update.moved_share == 0
        shares = projected(matrix, after, after, right=torch.eye(update.shape[1])[:, :2])
        assert shares.norm == 0 and shares.right is None and shares.left is None


def test_the_moved_share_counts_the_entries_that_differ():
    before = torch.zeros(4, 6)
    after = before.clone()
    after[1, 2] = after[3, 0] = after[3, 1] = 1
    assert update_of(SINGLE, {"q.weight": after}, {"q.weight": before}).moved_share == 3 / 24


def test_neither_model_is_changed():
    after, before = {"o.weight": torch.ones(6, 4)}, {"o.weight": torch.zeros(6, 4)}
    update_of(WRITE, after, before)
    projected(WRITE, after, before, right=torch.eye(4)[:, :1])
    assert after["o.weight"].eq(1).all() and before["o.weight"].eq(0).all()


def test_matrices_of_unequal_shapes_are_refused_with_both():
    message = r"L0\.q is of shape \(4, 6\) after and of shape \(4, 8\) before: take two checkpoints of one"
    with pytest.raises(ValueError, match=message):
        update_of(SINGLE, {"q.weight": torch.zeros(4, 6)}, {"q.weight": torch.zeros(4, 8)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("measure", [update_of, projected])
def test_an_update_that_is_not_finite_is_refused(value, measure):
    after = torch.zeros(4, 6)
    after[2, 3] = value
    with pytest.raises(ValueError, match=r"the update of L0\.q has entries that are not finite"):
        measure(SINGLE, {"q.weight": after}, {"q.weight": torch.zeros(4, 6)})


MEMORY = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import LlamaConfig
from weightgeom.models.residual import ResidualMatrix
from weightgeom.estimators import updates as update
from weightgeom.geometry import gram
from weightgeom.estimators.updates import projected, update_of
from weightgeom.models.weights import Stored

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

directory = Path(sys.argv[1])
after, before = (Stored({"m.weight": (directory / name, "m.weight")}) for name in ("after", "before"))
matrix = ResidualMatrix(0, sys.argv[2], "m")
left, right = (torch.ones(size, 8) for size in matrix.of(after).shape)
gram.product(torch.ones(512, 512), torch.ones(512, 512))
start, peak = anonymous(), 0.0
product = gram.product
def sampled(a, b):
    global peak
    result = product(a, b)
    peak = max(peak, anonymous())
    return result
gram.product = update.product = sampled
update_of(matrix, after, before)
projected(matrix, after, before, right=right, left=left)
print(peak - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind, shape", [("up", (65536, 512)), ("down", (512, 65536))])
def test_no_copy_of_a_stored_matrix_is_held(tmp_path, kind, shape, generator):
    tensor = torch.zeros(shape, dtype=torch.bfloat16)
    for name in ("after", "before"):
        save_file({"m.weight": tensor.add_(1)}, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), kind], capture_output=True, text=True, check=True
    )
    # The matrix is 128 MiB in float32 and 64 MiB as stored. Blocks are 4 MiB, of which a difference
    # needs three; the Gram matrix is 1 MiB, the projection of the longer side 2. oneDNN's compiled
    # kernels and what the allocator keeps are the rest.
    assert float(done.stdout) < 60

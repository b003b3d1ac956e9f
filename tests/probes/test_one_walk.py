from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from weightgeom.estimators import pairs
from weightgeom.estimators.pairs import Decomposition, OfPairs, together
from weightgeom.estimators.per_matrix import as_probe
from weightgeom.estimators.reference_subspaces import input_moments
from weightgeom.probes.connectivity import Connectivity
from weightgeom.probes.overlap import Overlap
from weightgeom.probes.rotation import Rotation
from weightgeom.probes.sparsity import Sparsity
from weightgeom.probes.spectrum import Spectrum

PROBES = {
    "sparsity": as_probe(Sparsity(grid="bfloat16", rank=4)),
    "rotation": Rotation(draws=2, k=3, leading=4),
    "spectrum": Spectrum(tokens=200, shuffles=2),
    "overlap": Overlap(tokens=200),
}


class Counted(Mapping):
    """Weights that count how often each is read."""

    def __init__(self, params):
        self.params, self.reads = params, Counter()

    def __getitem__(self, name):
        self.reads[name] += 1
        return self.params[name]

    def __iter__(self):
        return iter(self.params)

    def __len__(self):
        return len(self.params)


@pytest.fixture
def after(params, generator):
    return {name: x + 0.01 * torch.randn(x.shape, generator=generator) for name, x in params.items()}


def test_together_probes_have_the_rows_that_each_has_alone(params, after, at):
    setting = at(params, after)
    found = together({**PROBES, "connectivity": Connectivity()}, setting)(after)
    assert found.keys() == PROBES.keys()  # connectivity is about the whole model
    for name, probe in PROBES.items():
        rows = probe.measurement(setting)(after)
        assert rows and rows == found[name]


def test_a_walk_reads_every_matrix_once_for_all_probes(params, after, at, model):
    start, end = Counted(params), Counted(after)
    weights_alone = {
        "spectrum": Spectrum(of=["delta", "weight"]),
        "overlap": Overlap(pairs=["weight:weight_before", "delta:delta_next_layer", "delta:delta_end"]),
    }
    together(PROBES | weights_alone, replace(at(start), end=end))(end)
    # Each matrix once: three of GPT-NeoX are one parameter.
    once = Counter(matrix.parameter for matrix in model.architecture.matrices)
    read = ({name: found.reads[name] for name in once} for found in (start, end))
    assert list(read) == [once, once]


def test_one_pass_over_a_text_serves_all_probes_that_take_moments_of_its_inputs(
    params, after, at, monkeypatch
):
    texts = []

    def counted(setting, weights, inputs):
        assert weights is after
        texts.append(inputs.tokens)
        yield from input_moments(setting, weights, inputs)

    monkeypatch.setattr(pairs, "input_moments", counted)
    together({**PROBES, "long": Spectrum(tokens=300, shuffles=0)}, at(params, after))(after)
    assert texts == [200, 300]


def test_a_decomposition_is_that_of_an_svd(generator):
    for shape in ((6, 9), (9, 6), (5, 5)):
        matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
        for given in (matrix, torch.outer(matrix[:, 0], matrix[0])):
            parts = Decomposition.of(given)
            torch.testing.assert_close(parts.left * parts.values @ parts.right.T, given)
            torch.testing.assert_close(parts.values, torch.linalg.svdvals(given))
            for side in (parts.left, parts.right):
                torch.testing.assert_close(side.T @ side, torch.eye(min(shape), dtype=torch.float64))


def test_probes_of_pairs_say_so():
    assert all(isinstance(probe, OfPairs) for probe in PROBES.values())
    assert not isinstance(Connectivity(), OfPairs)

"""Updates planted in the subspace of every matrix, taken from the network itself, are found in every type."""

import pytest
import torch
from networks import CONFIGS, MIXTURES, language_model

from weightgeom.interfaces import Setting
from weightgeom.models.experts import unstacked
from weightgeom.probes.rsf import RSF
from weightgeom.text.tokens import packed

D, K, LENGTH, TOKENS = 32, 4, 96, 512


def input_axes(model, examples, site):
    """The principal directions of a module's input, in columns, strongest first; fp64."""
    rows = []
    for batch in packed(examples.heldout, model.tokenizer, LENGTH, TOKENS):
        keep = batch.attention_mask.bool()
        hook = model.network.get_submodule(site.module).register_forward_pre_hook(
            lambda module, given, keep=keep: rows.append(given[0].reshape(*keep.shape, -1)[keep])
        )
        model.network(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        hook.remove()
    return torch.linalg.svd(torch.cat(rows).double(), full_matrices=False).Vh.T


def output_axes(model, params):
    """The right singular vectors of the centred unembedding with the final norm's gain, in fp64."""
    unembedding = model.network.get_output_embeddings().weight.double()
    unembedding = unembedding * model.architecture.final_norm.gain(params)
    return torch.linalg.svd(unembedding - unembedding.mean(0), full_matrices=False).Vh.T


@pytest.mark.parametrize("name", CONFIGS | MIXTURES)
def test_an_update_planted_in_a_subspace_has_the_ratio_d_over_k_and_one_outside_has_none(
    name, examples, tokenizer, generator
):
    model, weights = language_model(name, tokenizer)
    start = unstacked(weights, model.architecture.stacks)
    reads = {(site.layer, site.name): input_axes(model, examples, site) for site in model.architecture.sites}
    probe = RSF(k=K, resamples=0, tokens=TOKENS, length=LENGTH, prompts=0)
    measure = probe.measurement(Setting(model, start, start, False, examples, 0))
    for part, expected in ((slice(K), D / K), (slice(K, None), 0.0)):
        rows = measure(planted(model, start, reads, part, generator))
        rows = [row for row in rows if row["quantity"] == "ratio" and row["subspace"] != "random"]
        assert len(rows) == len(model.architecture.matrices)
        # The subspaces of an expert's own tokens are planted in tests/estimators/test_experts.py.
        ratios = [row["value"] for row in rows if row.get("expert") is None or row["role"] == "write"]
        assert ratios == pytest.approx([expected] * len(ratios), rel=1e-3, abs=1e-3)


def planted(model, start, reads, part, generator):
    """The weights with an update of every matrix along a part of the axes of its own subspace."""
    writes, end = output_axes(model, start), start
    for matrix in model.architecture.matrices:
        axes = (reads[matrix.layer, matrix.site] if matrix.role == "read" else writes)[:, part]
        d_out, d_in = matrix.of(start).shape
        other = d_out if matrix.role == "read" else d_in
        delta = torch.randn(other, axes.shape[1], generator=generator, dtype=torch.float64) @ axes.T / 10
        if (
            matrix.role == "write"
        ):  # W' with diag(g) W' = diag(g) W + delta: the planted update reaches the stream
            delta = delta.T if matrix.norm is None else delta.T / matrix.norm.gain(start)[:, None]
        end = matrix.replaced(end, matrix.of(end) + delta.float())
    return end

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import LlamaConfig, PreTrainedConfig

from weightgeom import architectures
from weightgeom.models.residual import (
    Architecture,
    Norm,
    ResidualMatrix,
    Rows,
    Site,
    architecture_of,
    input_sites,
)


@st.composite
def fused_matrices(draw):
    """Matrices that tile one fused weight, and that weight."""
    groups = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    d_in, transposed = draw(st.integers(1, 4)), draw(st.booleans())
    edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    rows = [Rows(groups, sum(sizes), start, end - start) for start, end in pairwise(edges)]
    matrices = [ResidualMatrix(0, "q", "fused", rows=r, transposed=transposed) for r in rows]
    weight = torch.arange(float(groups * sum(sizes) * d_in)).reshape(-1, d_in)
    return matrices, {"fused.weight": weight.T if transposed else weight}


@given(fused_matrices())
def test_the_matrices_of_a_fused_weight_hold_each_of_its_entries_once(case):
    matrices, params = case
    entries = torch.cat([matrix.of(params).flatten() for matrix in matrices])
    assert_close(entries.sort().values, torch.arange(float(params["fused.weight"].numel())))


@given(fused_matrices())
def test_replacing_a_matrix_by_itself_changes_nothing(case):
    matrices, params = case
    for matrix in matrices:
        same = matrix.replaced(params, matrix.of(params))
        assert_close(same["fused.weight"], params["fused.weight"])


@given(fused_matrices())
def test_replacing_a_matrix_leaves_its_fused_neighbours_and_the_original_alone(case):
    matrices, params = case
    before = params["fused.weight"].clone()
    for matrix in matrices:
        edited = matrix.replaced(params, torch.full_like(matrix.of(params), -1))
        for other in matrices:
            expected = -torch.ones_like(other.of(params)) if other is matrix else other.of(params)
            assert_close(other.of(edited), expected)
    assert_close(params["fused.weight"], before)


def test_rows_fused_by_head_are_gathered_from_every_head():
    # 2 heads, d_head 1: rows are q0 k0 v0 q1 k1 v1
    fused = torch.tensor([[10.0], [20.0], [30.0], [11.0], [21.0], [31.0]])
    k = ResidualMatrix(0, "k", "qkv", heads=2, rows=Rows(groups=2, stride=3, start=1, size=1))
    assert_close(k.of({"qkv.weight": fused}), torch.tensor([[20.0], [21.0]]))


def test_a_matrix_that_is_not_fused_by_head_is_a_view():
    params = {"w.weight": torch.zeros(6, 4)}
    for rows, transposed in ((None, False), (None, True), (Rows(1, 6, 2, 2), False)):
        view = ResidualMatrix(0, "q", "w", rows=rows, transposed=transposed).of(params)
        assert view.untyped_storage().data_ptr() == params["w.weight"].untyped_storage().data_ptr()


def test_what_is_written_has_the_gain_of_the_norm_and_the_constant_factor():
    # gain 1 + (1, 3) = (2, 4), times 0.5: rows (1, 2) and (3, 4) by 1 and 2.
    params = {"w.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "norm.weight": torch.tensor([1.0, 3.0])}
    plain = ResidualMatrix(0, "o", "w")
    assert plain.gain(params) is None
    assert_close(plain.written(params), params["w.weight"])
    scaled = replace(plain, factor=0.5)
    assert_close(scaled.written(params), torch.tensor([[0.5, 1.0], [1.5, 2.0]]))
    normed = replace(scaled, norm=Norm("norm.weight", 1.0))
    assert_close(normed.written(params), torch.tensor([[1.0, 2.0], [6.0, 8.0]]))


def test_the_gain_of_a_factor_is_as_precise_as_fp32_on_half_precision_weights():
    # 0.22 in bfloat16 is 0.2197...: the gain is applied to fp32 or better.
    gain = ResidualMatrix(0, "o", "w", factor=0.22).gain({"w.weight": torch.ones(2, 2).bfloat16()})
    assert_close(gain, torch.full((2,), 0.22))


def test_replaced_shares_the_other_parameters():
    params = {"w.weight": torch.zeros(2, 2), "other": torch.ones(3)}
    edited = ResidualMatrix(0, "up", "w").replaced(params, torch.ones(2, 2))
    assert edited["other"] is params["other"]


def test_replaced_keeps_the_stored_dtype():
    params = {"w.weight": torch.zeros(2, 2, dtype=torch.bfloat16)}
    edited = ResidualMatrix(0, "up", "w").replaced(params, torch.ones(2, 2))
    assert edited["w.weight"].dtype == torch.bfloat16


def test_replaced_passes_the_gradient_on_to_the_value():
    value = torch.ones(2, 3, requires_grad=True)
    q = ResidualMatrix(0, "q", "w", rows=Rows(2, 2, 1, 1))
    edited = q.replaced({"w.weight": torch.zeros(4, 3, requires_grad=True)}, value)
    edited["w.weight"].sum().backward()
    assert_close(value.grad, torch.ones(2, 3))


def test_replaced_refuses_a_value_of_another_shape():
    q = ResidualMatrix(3, "q", "w", rows=Rows(1, 4, 0, 2))
    with pytest.raises(ValueError, match=r"L3\.q has shape \(2, 3\), got a value of \(1, 3\)"):
        q.replaced({"w.weight": torch.zeros(4, 3)}, torch.zeros(1, 3))


def test_written_scales_each_output_direction_by_the_gain_of_the_norm_behind():
    params = {"w.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "n": torch.tensor([1.0, -0.5])}
    # gains 1 + 1 = 2 and 1 - 0.5 = 0.5
    down = ResidualMatrix(0, "down", "w", norm=Norm("n", offset=1.0))
    assert_close(down.written(params), torch.tensor([[2.0, 4.0], [1.5, 2.0]]))
    assert_close(replace(down, norm=None).written(params), params["w.weight"])


def test_a_gain_near_one_keeps_the_digits_of_a_bfloat16_weight():
    weight = torch.tensor([2.0**-12], dtype=torch.bfloat16)  # 1 + 2⁻¹² rounds to 1 in bfloat16
    assert_close(Norm("n", 1.0).gain({"n": weight}), torch.tensor([1 + 2.0**-12]), rtol=0, atol=0)


def test_names_and_roles_of_the_matrices():
    roles = {kind: ResidualMatrix(3, kind, "w").role for kind in ("q", "k", "v", "gate", "up")}
    assert set(roles.values()) == {"read"}
    assert ResidualMatrix(3, "o", "w").role == ResidualMatrix(3, "down", "w").role == "write"
    assert ResidualMatrix(3, "down", "w").name == "L3.down"


def test_sites_are_the_inputs_of_q_and_up():
    matrices = [ResidualMatrix(1, kind, kind) for kind in ("q", "k", "up", "o")]
    expected = (Site(1, "attention_input", "q"), Site(1, "mlp_input", "up"))
    assert input_sites(matrices) == expected


def small(tied: bool) -> Architecture:
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    config.tie_word_embeddings = tied
    return architecture_of(config)


def test_a_tied_unembedding_is_the_embedding():
    embedding = torch.ones(5, 8)
    params = {"model.embed_tokens.weight": embedding}
    assert small(tied=True).unembedding(params) is embedding


def test_an_unembedding_of_its_own_is_preferred():
    params = {"model.embed_tokens.weight": torch.ones(5, 8), "lm_head.weight": torch.zeros(5, 8)}
    assert small(tied=False).unembedding(params) is params["lm_head.weight"]


def test_an_untied_model_without_its_unembedding_is_refused():
    with pytest.raises(KeyError, match=r"no lm_head\.weight among the weights, and this model"):
        small(tied=False).unembedding({"model.embed_tokens.weight": torch.ones(5, 8)})


class Unmapped(PreTrainedConfig):
    model_type = "xyz"


def test_a_family_without_a_map_is_refused_with_the_file_to_add():
    message = (
        r"no residual-stream map for 'xyz': add a function architecture\(config\) in "
        r"weightgeom/architectures/xyz\.py"
    )
    with pytest.raises(NotImplementedError, match=message):
        architecture_of(Unmapped())


def test_a_failing_import_inside_a_map_is_not_taken_for_a_missing_map(tmp_path, monkeypatch):
    (tmp_path / "xyz.py").write_text("import a_package_that_does_not_exist\n")
    monkeypatch.setattr(architectures, "__path__", [*architectures.__path__, str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="a_package_that_does_not_exist"):
        architecture_of(Unmapped())

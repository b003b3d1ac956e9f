import json
import logging
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
from moving import matrix_of, moved
from safetensors.torch import save_file
from torch.testing import assert_close

from weightgeom.analysis.summaries import by_treatment
from weightgeom.causal.effects import Effects, Evaluation
from weightgeom.estimators.given_subspaces import (
    check_frame_prompts,
    check_frames,
    directions_in,
    given_subspaces,
    prompts_of,
)
from weightgeom.estimators.hidden_states import last_inputs, last_states
from weightgeom.geometry.contrast_subspace import ContrastSubspace
from weightgeom.geometry.subspace import Subspace
from weightgeom.interfaces import Setting
from weightgeom.interventions.surgery import DeltaSurgery
from weightgeom.probes.alignment import Alignment
from weightgeom.probes.rsf import RSF
from weightgeom.table import tabulate
from weightgeom.text.examples import Question

D, K = 32, 4
GROUPS = ["color", "place"]
quick = partial(RSF, resamples=0, tokens=512, prompts=0)


@pytest.fixture
def asked(world, examples):
    """Examples with two groups of prompts of two words, which have none in common."""
    words = sorted({word for text in examples.heldout for word in text.split()})
    groups = {
        "color": tuple(Question(f"{first} {last}", "") for first in words[:6] for last in words[20:24]),
        "place": tuple(Question(f"{first} {last}", "") for first in words[6:12] for last in words[24:28]),
    }
    return replace(examples, groups=groups)


@pytest.fixture
def setting(model, params, asked):
    return Setting(model, params, params, False, asked, seed=3)


def value(rows, name, quantity, subspace, k=None):
    (number,) = [
        row["value"]
        for row in rows
        if row.get("matrix")
        and f"L{row['layer']}.{row['matrix']}" == name
        and row["quantity"] == quantity
        and row["subspace"] == subspace
        and (k is None or row["k"] == k)
    ]
    return number


def inside(model, params, name, basis, generator):
    """A random update of a matrix whose residual side lies in the span of the basis."""
    matrix = matrix_of(model, name)
    other = matrix.of(params).shape[0 if matrix.role == "read" else 1]
    update = basis @ torch.randn(basis.shape[1], other, generator=generator, dtype=torch.float64)
    return update.T if matrix.role == "read" else update


def test_an_update_planted_in_the_contrast_has_the_ratio_d_over_k_and_no_shuffled_groups_reach_it(
    model, params, setting, generator
):
    (contrast,) = given_subspaces({"topic": GROUPS}, setting, K)
    names = ["L1.q", "L1.up", "L0.o", "L1.down"]
    spaces = {name: contrast.at(matrix_of(model, name)) for name in names}
    bases = {name: space.basis for name, space in spaces.items() if space is not None}
    deltas = {name: inside(model, params, name, basis, generator) for name, basis in bases.items()}
    rows = quick(frames={"topic": GROUPS}).measurement(setting)(moved(model, params, deltas))
    for name in names:
        assert bases[name].shape == (D, K)
        assert value(rows, name, "frame_ratio", "topic") == pytest.approx(D / K, rel=1e-4)
        assert value(rows, name, "permuted_frame_ratio_mean", "topic") < 0.7 * D / K
        assert value(rows, name, "permuted_frame_p_value", "topic") == 1 / 40
        assert value(rows, name, "frame_p_value", "topic") <= 0.01
    # At the smaller k the first direction alone, which holds about a fourth of a random mixture of four.
    rows = quick(k=[1, K], frames={"topic": GROUPS}).measurement(setting)(moved(model, params, deltas))
    assert 0 < value(rows, "L1.q", "frame_fraction", "topic", k=1) < 0.6


@pytest.mark.slow
def test_shuffled_groups_give_the_null(model, params, asked, generator):
    """Groups from one pool: the p-values of a contrast against its permutations are uniform."""
    pool = [question for group in asked.groups.values() for question in group]
    delta = torch.randn(D, D, generator=generator)
    p_values = []
    for seed in range(12):
        order = torch.randperm(len(pool), generator=generator).tolist()
        mixed = {"color": tuple(pool[i] for i in order[:24]), "place": tuple(pool[i] for i in order[24:])}
        at = Setting(model, params, params, False, replace(asked, groups=mixed), seed)
        rows = quick(frames={"topic": GROUPS}).measurement(at)(moved(model, params, {"L1.q": delta}))
        p_values.append(value(rows, "L1.q", "permuted_frame_p_value", "topic"))
    # The mean of 12 uniform p has the sd 0.083: the bound is four of those.
    assert abs(sum(p_values) / 12 - 0.5) < 0.34
    assert min(p_values) > 1 / 40 or sorted(p_values)[1] > 1 / 40


def test_a_frame_from_a_file_gives_the_rows_of_the_same_frame_given_as_prompts(
    model, params, setting, generator, tmp_path
):
    (contrast,) = given_subspaces({"topic": GROUPS}, setting, K)
    file = tmp_path / "topic.safetensors"
    save_file({place: space.basis.contiguous() for place, space in contrast.spaces.items()}, file)
    probe = quick(k=K, frames={"topic": GROUPS, "saved": str(file)})
    delta = torch.randn(D, D, generator=generator)
    rows = probe.measurement(setting)(moved(model, params, {"L1.q": delta, "L0.o": delta}))
    for name in ("L1.q", "L0.o"):
        for quantity in ("fraction", "ratio", "null_ratio_sd", "z", "p_value"):
            expected = value(rows, name, f"frame_{quantity}", "topic", K)
            assert value(rows, name, f"frame_{quantity}", "saved", K) == pytest.approx(expected, rel=1e-9)
        assert value(rows, name, "frame_overlap", "topic:saved") == pytest.approx(1)
        assert value(rows, name, "null_frame_overlap_mean", "topic:saved") == K / D
    assert not any(row["subspace"] == "saved" for row in rows if row["quantity"].startswith("permuted"))


def test_frames_leave_every_other_row_as_it_is(model, params, setting, generator):
    after = moved(model, params, {"L1.q": torch.randn(D, D, generator=generator)})
    plain = quick().measurement(setting)(after)
    with_frames = quick(frames={"topic": GROUPS}).measurement(setting)(after)
    assert [
        row for row in with_frames if "frame" not in row["quantity"] and "group" not in row["quantity"]
    ] == plain
    assert len(with_frames) > len(plain)


def test_states_are_taken_at_the_last_token_of_each_prompt(model, params, setting):
    texts = ["Ann", *setting.examples.heldout[:2]]  # of different lengths, so padded
    network = model.with_weights(params).eval()
    sites = model.architecture.sites
    inputs = last_inputs(model, network, texts, sites)
    behind = last_states(model, network, texts, [0])
    for index, text in enumerate(texts):
        seen = {}
        hooks = [
            network.get_submodule(site.module).register_forward_hook(
                lambda module, given, output, site=site, seen=seen: seen.update({site: given[0][0, -1]})
            )
            for site in sites
        ]
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        states = network(ids, output_hidden_states=True).hidden_states
        for hook in hooks:
            hook.remove()
        for site in sites:
            assert_close(inputs[site][index], seen[site], rtol=1e-4, atol=1e-5)
        assert_close(behind[0][index], states[1][0, -1], rtol=1e-4, atol=1e-5)


def test_the_first_direction_is_the_difference_of_means_and_the_next_where_one_group_varies_more(generator):
    d, n = 12, 4000
    first, second = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    first[:, 0] += 3  # the means differ along e0
    first[:, 1] *= 4  # the first group varies along e1, the second along e2
    second[:, 2] *= 3
    space = ContrastSubspace.of(first, second, 3, 0).space(3)
    assert space is not None
    # Means have errors of 4/√4000 = 0.06 a coordinate against 3, and covariances of 0.4 against 8.
    assert_close(space.basis.abs(), torch.eye(d, 3, dtype=torch.float64), rtol=0, atol=0.12)
    swapped = ContrastSubspace.of(second, first, 3, 0).space(3)
    assert swapped is not None
    assert space.fraction(swapped.basis.T) == pytest.approx(1)


def test_the_worked_example_of_the_documentation():
    first = torch.tensor([[2.0, 3, 0, 0], [2, -3, 0, 0]], dtype=torch.float64).repeat(4, 1)
    second = torch.tensor([[0.0, 0, 1, 0], [0, 0, -1, 0]], dtype=torch.float64).repeat(4, 1)
    space = ContrastSubspace.of(first, second, 3, 0).space(4)
    assert space is not None
    # e1 from the means, e2 (variance 9 - 0) and e3 (0 - 1) from the covariances, and no fourth direction.
    assert_close(space.basis.abs(), torch.eye(4, 3, dtype=torch.float64), rtol=0, atol=1e-12)
    read = torch.tensor([[1.0, 1, 0, 0]], dtype=torch.float64)
    assert float(space.first(1).relative_fraction(read)) == pytest.approx(2)
    assert float(space.first(2).relative_fraction(read)) == pytest.approx(2)


def test_groups_that_are_alike_have_no_subspace():
    states = torch.ones(9, 5, dtype=torch.float64)
    assert ContrastSubspace.of(states, states, 3, 0).space(2) is None


def test_groups_in_orthogonal_directions_overlap_less_than_shuffled_ones(generator):
    d, n = 16, 40
    first, second = torch.zeros(2, n, d, dtype=torch.float64)
    first[:, :3] = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    second[:, 3:6] = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    overlaps, sizes = ContrastSubspace.of(first, second, 19, 0).group_overlaps
    assert float(overlaps[0]) == pytest.approx(0, abs=1e-12)
    assert sizes == (3, 3)
    assert float(overlaps[1:].min()) > 0.9  # every shuffled group spans all six


def test_the_ratio_of_every_arrangement_is_that_of_its_own_subspace(generator):
    first, second = torch.randn(2, 9, 40, generator=generator, dtype=torch.float64)
    contrast = ContrastSubspace.of(first, second, 4, 0)
    update = torch.randn(7, 40, generator=generator, dtype=torch.float64)
    ratios = contrast.ratios(update.T @ update, 3)
    for order, ratio in zip(contrast.orders, ratios, strict=True):
        pooled = torch.cat([first, second])[order]
        again = ContrastSubspace.of(pooled[:9], pooled[9:], 1, 0).space(3)
        assert again is not None
        assert float(ratio) == pytest.approx(float(again.relative_fraction(update)))


def test_directions_that_are_not_orthonormal_become_a_basis_of_their_span(tmp_path, generator, caplog):
    given = torch.randn(D, 3, generator=generator)
    save_file({"safety": given.contiguous()}, tmp_path / "a.safetensors")
    with caplog.at_level(logging.INFO):
        (basis,) = directions_in(str(tmp_path / "a.safetensors")).values()
    assert "not orthonormal" in caplog.text
    assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))
    assert float(Subspace(basis).fraction(given.T.double())) == pytest.approx(1)
    caplog.clear()
    save_file({"safety": torch.linalg.qr(given).Q.half().contiguous()}, tmp_path / "b.safetensors")
    (basis,) = directions_in(str(tmp_path / "b.safetensors")).values()
    assert not caplog.text
    assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))


def refused(model, tensors, path):
    save_file(tensors, path)
    check_frames({"safety": str(path)}, model.architecture, "probe.rsf.frames")


def test_files_that_do_not_fit_are_refused(model, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"the shape \(5, 2\), and the residual stream is 32 wide"):
        refused(model, {"a": torch.eye(5, 2)}, path)
    with pytest.raises(ValueError, match=r"the shape \(2, 32\): give d x k"):
        refused(model, {"a": torch.eye(2, D)}, path)
    with pytest.raises(
        ValueError, match=r"directions for L7.q, which the model does not have: .* L0.q, L0.att"
    ):
        refused(model, {"L7.q": torch.eye(D, 2)}, path)
    with pytest.raises(ValueError, match="linearly dependent, of rank 1 of 2"):
        refused(model, {"a": torch.ones(D, 2)}, path)
    with pytest.raises(ValueError, match="not finite"):
        refused(model, {"a": torch.full((D, 2), torch.nan)}, path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read"):
        check_frames({"safety": str(path)}, model.architecture, "probe.rsf.frames")
    with pytest.raises(ValueError, match=r"no safetensors file 'b.npy'"):
        RSF(frames={"safety": "b.npy"}).check(model.architecture)
    refused(model, {"L1": torch.eye(D, 2), "L0.residual": torch.eye(D, 1)}, path)


@pytest.mark.parametrize("name", ["prediction", "a:b", "1st"])
def test_names_that_are_taken_or_have_separators_are_refused(model, name):
    with pytest.raises(ValueError, match=f"probe.rsf.frames has the name {name!r}"):
        RSF(frames={name: GROUPS}).check(model.architecture)


def test_groups_of_prompts_that_are_missing_few_or_shared_are_refused(asked, tmp_path):
    def check(*groups, of=asked):
        check_frame_prompts({"topic": list(groups)}, of, "probe.rsf.frames")

    check(*GROUPS)
    with pytest.raises(
        ValueError, match=r"'shape' is no file, and no group of the data \(these are color, place"
    ):
        check("color", "shape")
    few = tmp_path / "few.txt"
    few.write_text("one\n\ntwo\n")
    with pytest.raises(ValueError, match=r"too few prompts \(color 24 and .*few.txt 2\): give 8 or more"):
        check("color", str(few))
    same = tmp_path / "same.jsonl"
    lines = [json.dumps({"prompt": question.prompt}) for question in asked.groups["color"]]
    same.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="both groups have the prompt"):
        check("color", str(same))
    check("place", str(same))
    with pytest.raises(ValueError, match="is a glob: join its files"):
        check("place", str(tmp_path / "*.jsonl"))
    same.write_text(json.dumps({"text": "a"}))
    with pytest.raises(ValueError, match="has no field 'prompt'"):
        check("place", str(same))


def test_a_contrast_needs_two_different_groups(model):
    for groups in (["color"], ["color", "color"]):
        with pytest.raises(ValueError, match="or two different groups of prompts"):
            RSF(frames={"topic": groups}).check(model.architecture)


def test_prompts_in_a_file_are_read_once_each_from_records_or_blocks(asked, tmp_path):
    blocks = tmp_path / "a.txt"
    blocks.write_text(
        "\n\n".join([*(f"prompt {i}\nof two lines" for i in range(9)), "prompt 0\nof two lines"])
    )
    groups = prompts_of(["color", str(blocks)], asked, "frames.a")
    assert groups[str(blocks)] == [f"prompt {i}\nof two lines" for i in range(9)]


def test_surgery_in_a_given_subspace_removes_and_keeps_what_lies_in_it(
    model, params, asked, generator, tmp_path
):
    basis = torch.linalg.qr(torch.randn(D, 3, generator=generator)).Q
    save_file({"safety": basis.contiguous()}, tmp_path / "a.safetensors")
    frames = {"safety": str(tmp_path / "a.safetensors"), "topic": GROUPS}
    surgery = DeltaSurgery(
        k=[2, 4],
        frames=frames,
        transplants=[],
        controls={"random_k": 2, "random_energy": 2},
        level=0.5,
        tokens=256,
        effects=Effects(tokens=64, length=32, pairs=2, questions=2),
    )
    surgery.check(model.architecture)
    names = [matrix.name for matrix in model.architecture.matrices]
    shapes = {name: matrix_of(model, name).of(params).shape for name in names}
    deltas = {name: torch.randn(shape, generator=generator) / 10 for name, shape in shapes.items()}
    end = moved(model, params, deltas)
    setting = Setting(model, params, end, False, asked, 3, last=7)
    evaluation = Evaluation(model, end, asked, surgery.effects)
    groups = surgery._groups(model.architecture)
    trials = list(surgery.surgeries(setting, evaluation, groups))
    assert sum(1 + len(trial.controls) for trial in trials) == surgery.arms(model.architecture)
    given = {subspace.name: subspace for subspace in given_subspaces(frames, setting, 4)}
    seen = set()
    for trial in trials:
        name, k = trial.place["subspace"], trial.place["k"]
        if name not in given:
            assert name in ("attention_input+mlp_input", "prediction")
            continue
        seen.add((name, k))
        edited = trial.treatment.edit.applied(end)
        for matrix in groups[0].matrices if trial.place["role"] == "read" else groups[1].matrices:
            left = matrix.of(edited).double() - matrix.of(params).double()
            whole = matrix.of(end).double() - matrix.of(params).double()
            space = given[name].at(matrix)
            assert space is not None
            columns = space.basis[:, :k]
            part = whole @ columns @ columns.T if matrix.role == "read" else columns @ columns.T @ whole
            assert_close(left, part if trial.dose == "keep" else whole - part, rtol=1e-4, atol=1e-6)
        sizes = trial.treatment.sizes
        for control in trial.controls:
            if control.kind == "random_k":
                assert control.sizes["dimension"] == sizes["dimension"] == k
            else:
                assert control.sizes["removed energy"] == pytest.approx(sizes["removed energy"], rel=1e-4)
    assert seen == {("safety", 3), ("topic", 2), ("topic", 4)}


def test_tables_and_figures_of_surgery_keep_given_subspaces_apart(model, params, asked, generator):
    delta = torch.randn(D, D, generator=generator)
    setting = Setting(model, params, moved(model, params, {"L1.q": delta}), False, asked, 3, last=7)
    surgery = DeltaSurgery(
        groups=[["q"]],
        k=2,
        frames={"topic": GROUPS},
        transplants=[],
        controls={"random_k": 2, "random_energy": 2},
        level=0.5,
        tokens=256,
        effects=Effects(tokens=64, length=32, pairs=2, questions=2),
    )
    table = tabulate(surgery.rows(setting, lambda metrics, step: None))
    assert set(surgery.figures({"training": table})) == {"surgery", "surgery_topic"}
    plain = tabulate(replace(surgery, frames={}).rows(setting, lambda metrics, step: None))
    effect, (control, *_) = "kl_from_unedited", surgery.declaration.controls
    shown = by_treatment(table, effect, [control])
    assert set(shown["matrix"]) == {"q", "q in topic"}
    own = shown.loc[shown["matrix"] == "q"].reset_index(drop=True)
    pd.testing.assert_frame_equal(own, by_treatment(plain, effect, [control]))


def test_alignment_in_a_given_subspace_is_that_of_the_parts_inside(model, params, asked, generator, tmp_path):
    basis = torch.linalg.qr(torch.randn(D, 5, generator=generator)).Q
    save_file({"safety": basis.contiguous()}, tmp_path / "a.safetensors")
    for name in ("L1.q", "L0.down"):
        matrix = matrix_of(model, name)
        shape = matrix.of(params).shape
        shared = torch.randn(shape, generator=generator)
        projector = basis @ basis.T
        inside = shared @ projector if matrix.role == "read" else projector @ shared
        a = shared
        b = 2 * inside - 3 * (shared - inside)  # along A inside, against it outside
        weights = [params, moved(model, params, {name: a}), moved(model, params, {name: a + b})]
        setting = Setting(
            model, params, weights[-1], False, asked, 3, last=2, checkpoints=dict(enumerate(weights))
        )
        probe = Alignment(k=2, frames={"safety": str(tmp_path / "a.safetensors")})
        probe.check(model.architecture)
        rows = probe.measurement(setting)(weights[-1])
        cosines = {
            (row["quantity"], row.get("subspace", "")): row["value"]
            for row in rows
            if row.get("matrix") and row["quantity"] in ("cosine", "frame_cosine")
        }
        assert cosines["frame_cosine", "safety"] == pytest.approx(1, abs=1e-5)
        assert cosines["cosine", ""] < -0.5
        (sd,) = {r["value"] for r in rows if r["quantity"] == "frame_null_cosine_sd" and r.get("matrix")}
        other = shape[0] if matrix.role == "read" else shape[1]
        assert sd == pytest.approx((other * 5) ** -0.5)  # of one matrix: 1 / √entries of the parts
        plain = replace(probe, frames={}).measurement(setting)(weights[-1])
        assert [row for row in rows if not row["quantity"].startswith("frame_")] == plain
        table = tabulate(rows)
        assert len(probe.summary(table)) == 1
        assert set(probe.figures({"training": table})) == {"alignment", "locking"}


def test_a_list_takes_the_names_of_its_files_and_groups():
    groups = ["harmful.jsonl", "harmless.jsonl"]
    listed: Any = ["attention_input", "prediction", "dir/my safety.safetensors", groups]
    frames = {"my_safety": "dir/my safety.safetensors", "harmful_against_harmless": groups}
    assert RSF(frames=listed).frames == frames and Alignment(frames=listed).frames == frames
    none: Any = None
    assert RSF(frames=none).frames == {}
    ambiguous: Any = ["a.st", "b/a.st"]
    with pytest.raises(ValueError, match=r"two subspaces would be named a: give names, as in \{a: b/a.st"):
        RSF(frames=ambiguous)

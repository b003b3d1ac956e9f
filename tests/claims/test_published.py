# pandas types the results of indexing as unions of everything they may ever be.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

"""Every published claim's rule, on planted tables and on updates that are measured."""

import pandas as pd
import pytest
import torch
from asked import probed
from hydra.utils import get_class

from runners.errors import CONF
from weightgeom.analysis.chain import STAGES
from weightgeom.analysis.referee import EXPLAINED, UNTESTABLE, Claim, Update, verdicts
from weightgeom.claims import published
from weightgeom.claims.dpo_near_orthogonal import DpoNearOrthogonal
from weightgeom.claims.intruders_of_adapters import IntrudersOfAdapters
from weightgeom.claims.little_rotation import LittleRotation
from weightgeom.claims.low_magnitude import LowMagnitude
from weightgeom.claims.no_intruders import NoIntruders
from weightgeom.claims.objective_from_spectrum import ObjectiveFromSpectrum
from weightgeom.claims.off_principal import OffPrincipal
from weightgeom.claims.preserved_spectrum import PreservedSpectrum
from weightgeom.claims.reads_concentrate import ReadsConcentrate
from weightgeom.claims.safety_overlaps import SafetyOverlaps
from weightgeom.claims.small_weights import SmallWeights
from weightgeom.claims.sparse_in_bf16 import SparseInBf16
from weightgeom.claims.sparse_updates import SparseUpdates
from weightgeom.claims.uncertainty_unexpressed import UncertaintyUnexpressed
from weightgeom.claims.universal_subspaces import UniversalSubspaces
from weightgeom.claims.writes_near_isotropic import WritesNearIsotropic
from weightgeom.estimators.alignment import aligned as compared
from weightgeom.estimators.alignment import leading, pooled
from weightgeom.geometry.nulls import rotated
from weightgeom.probes.sparsity import Sparsity
from weightgeom.table import row, tabulate

CLAIMS = [get_class(target) for target in published()]


def planted(probe, quantity, ours, null, sd, matrices=("q", "k", "o", "down"), **more):
    """The rows of a quantity and its null, alike in two layers of every matrix."""
    values = {quantity: ours, f"null_{quantity}_mean": null, f"null_{quantity}_sd": sd, **more}
    rows = [
        row(name, value, n=9, layer=layer, matrix=matrix, subspace="")
        for name, value in values.items()
        for layer in (0, 1)
        for matrix in matrices
    ]
    return {probe: tabulate({"step": 1, **entry} for entry in rows)}


def finding_of(claim, tables, trained_by="dpo", kind="contrast", **params):
    (finding,) = verdicts([claim], [Update("it", tables, 1, trained_by, kind, params)]).itertuples()
    return finding


def verdict(claim, tables, **given):
    return finding_of(claim, tables, **given).verdict


@pytest.mark.parametrize("made", CLAIMS, ids=lambda made: made.__name__)
def test_every_claim_has_the_contract_its_paper_and_a_rule(made):
    claim = made()
    assert isinstance(claim, Claim)
    assert claim.paper.startswith("arXiv:2") and claim.statement.endswith(".") and claim.rule
    assert claim.about in ("", "contrast", "likelihood")
    assert set(claim.needs) <= {path.stem for path in (CONF / "probe").glob("*.yaml")}


@pytest.mark.parametrize("made", CLAIMS, ids=lambda made: made.__name__)
def test_every_claim_is_not_testable_without_its_rows(made):
    finding = finding_of(made(), {})
    assert finding.verdict == UNTESTABLE and "no rows of the probe" in finding.detail


@pytest.mark.parametrize("made", [SmallWeights, LowMagnitude])
def test_an_overlap_with_small_weights_must_exceed_that_of_its_null(made):
    share = {"invisible_share": 0.7}
    assert verdict(made(), planted("sparsity", "low_overlap", 0.9, 0.5, 0.01, **share)) == "supported"
    assert verdict(made(), planted("sparsity", "low_overlap", 0.74, 0.76, 0.01, **share)) == EXPLAINED
    assert verdict(made(), planted("sparsity", "low_overlap", 0.29, 0.5, 0.01, **share)) == "contradicted"
    other = planted("sparsity", "low_overlap", 0.45, 0.1, 0.01, **share)
    assert verdict(made(), other) == "supported"
    assert verdict(made(), other, **{"probe.sparsity.alpha": 0.5}) == "contradicted"  # of the run's own mask


def test_an_overlap_with_principal_weights_must_lie_below_that_of_its_null():
    assert verdict(OffPrincipal(), planted("sparsity", "principal_overlap", 0.1, 0.28, 0.01)) == "supported"
    assert verdict(OffPrincipal(), planted("sparsity", "principal_overlap", 0.1, 0.09, 0.01)) == EXPLAINED
    assert verdict(OffPrincipal(), planted("sparsity", "principal_overlap", 0.4, 0.2, 0.01)) == "contradicted"


@pytest.mark.parametrize(
    ("made", "quantity"),
    [(SparseInBf16, "invisible_share"), (SparseUpdates, "absolute_unmoved_share")],
)
def test_sparsity_must_exceed_that_of_an_iid_update_of_equal_norm(made, quantity):
    assert verdict(made(), planted("sparsity", quantity, 0.9, 0.3, 0.01)) == "supported"
    assert verdict(made(), planted("sparsity", quantity, 0.9, 0.89, 0.01)) == EXPLAINED
    assert verdict(made(), planted("sparsity", quantity, 0.1, 0.05, 0.01)) == "contradicted"


def test_angles_and_shifts_must_be_smaller_than_those_of_rotated_updates():
    more = {"right_angle": 5.0, "noise_left_angle_mean": 9.0}
    for claim, quantity in ((LittleRotation(), "left_angle"), (PreservedSpectrum(), "spectral_shift")):
        assert verdict(claim, planted("rotation", quantity, 2.0, 8.0, 0.1, **more)) == "supported"
        assert verdict(claim, planted("rotation", quantity, 7.8, 8.0, 0.1, **more)) == EXPLAINED
        assert verdict(claim, planted("rotation", quantity, 16.0, 8.0, 0.1, **more)) == "contradicted"


@pytest.mark.parametrize(("ours", "null"), [(4.0, 0.0), (4.0, 4.0), (0.0, 0.0)])
def test_intruders_are_judged_where_there_is_an_adapter_or_where_there_is_none(ours, null):
    rotation = planted("rotation", "intruders", ours, null, 0.1)
    full = {**rotation, **planted("rsf", "ratio", 1.0, 1.0, 1.0, delta_norm=1.0)}
    adapter = {**rotation, **planted("rsf", "ratio", 1.0, 1.0, 1.0, delta_norm=1.0, adapter_rank=8.0)}
    assert verdict(IntrudersOfAdapters(), full) == UNTESTABLE == verdict(NoIntruders(), adapter)
    of_adapter = {(4.0, 0.0): "supported", (4.0, 4.0): EXPLAINED, (0.0, 0.0): "contradicted"}
    assert verdict(IntrudersOfAdapters(), adapter) == of_adapter[ours, null]
    assert verdict(NoIntruders(), full) == ("contradicted" if ours else EXPLAINED)


def test_no_intruders_are_a_finding_where_random_updates_of_this_spectrum_add_some():
    tables = planted("rotation", "intruders", 0.0, 3.0, 0.1) | planted(
        "rsf", "ratio", 1.0, 1.0, 1.0, delta_norm=1.0
    )
    assert verdict(NoIntruders(), tables) == "supported"


def test_reads_must_exceed_their_rotations_and_adapters_are_left_out():
    claim = ReadsConcentrate()
    finding = finding_of(claim, planted("rsf", "ratio", 5.0, 1.0, 0.1, matched_ratio=4.5))
    assert finding.verdict == "supported" and "with these inputs, is 4.5" in finding.detail
    assert verdict(claim, planted("rsf", "ratio", 5.0, 1.0, 8.0)) == EXPLAINED  # of low rank: a wide null
    assert verdict(claim, planted("rsf", "ratio", 1.1, 1.0, 0.01)) == "contradicted"
    assert verdict(claim, planted("rsf", "ratio", 5.0, 1.0, 0.1, adapter_rank=8.0)) == UNTESTABLE


def test_writes_must_be_near_one_and_a_wide_null_explains_others():
    claim = WritesNearIsotropic()
    assert verdict(claim, planted("rsf", "ratio", 1.2, 1.0, 0.01)) == "supported"
    assert verdict(claim, planted("rsf", "ratio", 3.0, 1.0, 0.1)) == "contradicted"
    assert verdict(claim, planted("rsf", "ratio", 3.0, 1.0, 4.0)) == EXPLAINED
    assert verdict(claim, planted("rsf", "ratio", 0.5, 1.0, 0.1)) == "contradicted"


def test_uncertainty_is_judged_by_the_lines_of_its_own_claims():
    rows = probed()
    step = max(entry["step"] for entry in rows)
    update = Update("it", {"uncertainty": tabulate(rows)}, step, "dpo", "contrast")
    (finding,) = verdicts([UncertaintyUnexpressed()], [update]).itertuples()
    assert finding.verdict == "supported" and finding.ours < finding.null == 1
    assert "AUROC" in finding.detail


def measured(before, after):
    """The rows of the probe sparsity for one matrix."""
    values = Sparsity(rank=8).of_matrix(before, after)
    return {
        "sparsity": tabulate(
            {"step": 1, **row(name, value, n=before.numel(), layer=0, matrix="q")}
            for name, value in values.items()
        )
    }


def test_an_iid_update_is_explained_by_its_null_and_one_of_the_small_weights_is_not(generator):
    before = torch.randn(192, 192, generator=generator) * 0.02
    iid = before + 2e-5 * torch.randn(before.shape, generator=generator)
    finding = finding_of(SmallWeights(), measured(before, iid))
    # Its overlap is far above 0.3, as that of the update of a published training, and no structure at all.
    assert finding.verdict == EXPLAINED and finding.ours > 0.5
    assert abs(finding.ours - finding.null) < 5 * finding.null_sd
    small = before.abs() < before.abs().quantile(0.3)
    kept = before + torch.where(small, 2e-5, 0.0) * torch.randn(before.shape, generator=generator)
    heavy = finding_of(SmallWeights(), measured(before, kept))
    assert heavy.verdict == "supported" and heavy.ours == 1
    large = before + torch.where(small, 0.0, 1e-3) * torch.randn(before.shape, generator=generator)
    assert verdict(SmallWeights(), measured(before, large)) == "contradicted"


def seeds(between, within, sd, names=("dpo", "sft")):
    """Rows of two trainings of several seeds, as `weightgeom align` has them."""
    first, second = names
    place = {"step": 1, "treatment": second, "against": first, "n": 4}
    values = {"between_cosine_mean": between, "within_cosine_mean": within, "within_cosine_sd": sd}
    rows = [row(name, value, **place) for name, value in values.items()]
    pair = {"step": 1, "treatment": f"{second}.0", "against": f"{first}.0", "n": 4}
    return {"alignment": tabulate([*rows, row("cosine", between, **pair)])}


def test_dpo_is_orthogonal_to_likelihood_only_where_seeds_of_one_training_are_not():
    claim = DpoNearOrthogonal()
    finding = finding_of(claim, seeds(0.02, 0.9, 0.05))
    assert (finding.verdict, finding.ours, finding.null) == ("supported", 0.02, 0.9)
    assert verdict(claim, seeds(0.02, 0.05, 0.01)) == EXPLAINED  # seeds are as orthogonal
    assert verdict(claim, seeds(0.02, 0.9, 0.6)) == EXPLAINED  # or vary as much
    assert verdict(claim, seeds(-0.02, 0.9, 0.05)) == "supported"
    assert verdict(claim, seeds(0.5, 0.9, 0.05)) == "contradicted"
    assert verdict(claim, seeds(-0.5, 0.9, 0.05)) == "contradicted"
    finding = finding_of(claim, seeds(0.02, 0.9, 0.05, names=("ce", "sft")))
    assert finding.verdict == UNTESTABLE and "no training by preferences" in finding.detail


def test_a_chain_has_no_seeds_to_compare_its_stages_with():
    rows = [row("cosine", 0.03, n=9, step=2, against="1")]
    table = tabulate(rows)
    table.attrs[STAGES] = ["base", "sft", "dpo"]
    (finding,) = verdicts(
        [DpoNearOrthogonal()], [Update("it", {"alignment": table}, 2, "dpo", "contrast")]
    ).itertuples()
    assert (finding.verdict, finding.ours) == (UNTESTABLE, 0.03)
    assert "how alike two seeds of one training are: weightgeom align" in finding.detail


def aligned(cosine, share, random, names=("dpo", "sft")):
    """Rows of two trainings: their cosine, and the shares of one in the leading directions of the other."""
    rows = [row("cosine", cosine, n=9, step=1, treatment=names[1], against=names[0])]
    values = {
        "alignment_ratio": share**0.5,
        "null_alignment_ratio_mean": random**0.5,
        "null_alignment_ratio_sd": 0.0,
    }
    for first, second in (names, names[::-1]):
        rows += [
            row(name, value, n=9, step=1, treatment=first, against=second) for name, value in values.items()
        ]
    return {"alignment": tabulate(rows)}


def test_a_shared_subspace_must_exceed_that_of_a_common_mean():
    claim = UniversalSubspaces()
    finding = finding_of(claim, aligned(0.1, 0.8, 0.2))
    # With a common mean: 0.1 + 0.9 · 0.2 = 0.28.
    assert finding.verdict == "supported"
    assert (finding.ours, finding.null) == (pytest.approx(0.8), pytest.approx(0.28))
    assert verdict(claim, aligned(0.7, 0.8, 0.2)) == EXPLAINED  # the mean holds 0.7 + 0.3 · 0.2 = 0.76
    assert verdict(claim, aligned(0.0, 0.21, 0.2)) == "contradicted"
    finding = finding_of(claim, aligned(0.1, 0.8, 0.2, names=("dpo.0", "dpo.1")))
    assert finding.verdict == UNTESTABLE and "all updates are of one training" in finding.detail


def contrasted(ours, shuffled, sd, chance, name="safety"):
    values = {
        "group_overlap": ours,
        "null_group_overlap_mean": chance,
        "permuted_group_overlap_mean": shuffled,
        "permuted_group_overlap_sd": sd,
    }
    rows = [
        row(quantity, value, n=9, step=1, layer=layer, matrix="q", subspace=name)
        for quantity, value in values.items()
        for layer in (0, 1)
    ]
    return {"rsf": tabulate(rows)}


def test_groups_of_prompts_overlap_if_shuffled_ones_do_not_more_and_random_subspaces_less():
    claim = SafetyOverlaps()
    finding = finding_of(claim, contrasted(0.9, 0.92, 0.01, 0.3))
    assert finding.verdict == "supported" and finding.n == 2 and finding.detail.startswith("safety: 0.9")
    assert verdict(claim, contrasted(0.4, 0.92, 0.01, 0.3)) == "contradicted"
    assert verdict(claim, contrasted(0.4, 0.92, 0.5, 0.3)) == "supported"  # shuffled groups vary as much
    assert verdict(claim, contrasted(0.9, 0.92, 0.01, 0.9)) == EXPLAINED  # as any two subspaces of this size
    parts = [contrasted(0.9, 0.92, 0.01, 0.3), contrasted(0.1, 0.9, 0.01, 0.05, "other")]
    both = {"rsf": pd.concat([part["rsf"] for part in parts])}
    assert verdict(claim, both) == "supported"
    assert verdict(SafetyOverlaps(frame="other"), both) == "contradicted"


def spectra(generator, apart, by_norm=0.0, spread=0.1, number=3):
    """Participation ratios and norms of trainings of `number` seeds, in two layers."""
    rows = []
    for offset, name in enumerate(("dpo", "sft")):
        for seed in range(number):
            for layer in (0, 1, 2):
                noise = spread * torch.randn(2, generator=generator)
                place = {"step": 1, "treatment": f"{name}.{seed}", "layer": layer, "matrix": "q", "n": 9}
                rank = torch.exp(2 + apart * offset + noise[0])
                rows.append(row("participation_ratio", float(rank), **place))
                rows.append(row("delta_norm", float(torch.exp(by_norm * offset + noise[1])), **place))
    return {"alignment": tabulate(rows)}


def test_spectra_tell_the_objective_beyond_shuffled_labels_and_norms(generator):
    claim = ObjectiveFromSpectrum()
    finding = finding_of(claim, spectra(generator, apart=3.0))
    assert (finding.verdict, finding.ours, finding.n) == ("supported", 1.0, 6)
    # Of the 20 divisions of two clusters of three, 2 assign all six updates rightly, and the others four, the
    # majority of each cluster: (2 · 1 + 18 · 4/6) / 20.
    assert finding.null == pytest.approx(0.7)
    assert verdict(claim, spectra(generator, apart=3.0, by_norm=3.0)) == EXPLAINED  # norms tell as well
    alike = [verdict(claim, spectra(generator, apart=0.0)) for _ in range(6)]
    assert "contradicted" in alike and alike.count("supported") <= 1
    finding = finding_of(claim, spectra(generator, apart=3.0, number=2))
    assert finding.verdict == UNTESTABLE and "three seeds each" in finding.detail


def test_two_measured_trainings_with_a_common_mean_share_its_directions_and_no_others(generator):
    """Rank-4 updates m + a and m + b, which share m alone, as measured on matrices."""

    def low():
        return torch.randn(64, 4, generator=generator) @ torch.randn(4, 64, generator=generator)

    def table(first, second):
        rows, parts = [], {"dpo": leading(first), "sft": leading(second)}
        for names in (("dpo", "sft"), ("sft", "dpo")):
            values = pooled([compared(parts[names[0]], parts[names[1]])])
            keep = {name: value for name, value in values.items() if "alignment_ratio" in name}
            keep |= {"cosine": values["cosine"]} if names[0] == "sft" else {}
            rows += [row(k, v, n=9, step=1, treatment=names[0], against=names[1]) for k, v in keep.items()]
        return {"alignment": tabulate(rows)}

    mean = 2 * low()
    assert verdict(UniversalSubspaces(), table(mean + low(), mean + low())) == EXPLAINED
    assert verdict(UniversalSubspaces(), table(low(), low())) == "contradicted"
    left = low()
    assert verdict(UniversalSubspaces(), table(left, left @ rotated(torch.eye(64), generator))) == "supported"

import pandas as pd
import pytest

from weightgeom.bridge import bridge
from weightgeom.claims_uncertainty import CLAIMS, COUPLED, lines
from weightgeom.figures_uncertainty import abstentions, profiles, sensitivity, topology
from weightgeom.figures_uncertainty import bridge as bridge_figure
from weightgeom.table import row, tabulate

ARM = "heldout/known"


def probed(changed=(), step=0, stderr=0.1):
    """Rows of two layers in which every claim agrees, but for what is changed to a value with its ends."""
    agreeing = {
        "auroc_logistic": (0.9, 0.8, 1.0),
        "mle_dimension_ratio": (2.4, 2.1, 2.7),
        "mle_dimension_calibrated_ratio": (2.4, 2.1, 2.7),
        "amplification": (0.5, 0.4, 0.6),
        "fisher_ratio": (0.3, 0.2, 0.4),
        "fisher_sensitivity": (0.3, 0.2, 0.4),
        "gradient_coupling": (0.01, 0.0, 0.02),
        **dict(changed),
    }
    rows = []
    for layer in (0, 1):
        place = {"layer": layer, "step": step, "subspace": "residual"}
        for quantity, (value, low, high) in agreeing.items():
            scale = 1 + 9 * layer if quantity == "amplification" else 1 + layer / 100
            for end, one in (("", value), ("_low", low), ("_high", high)):
                error = stderr if not end else None
                rows.append(row(f"{quantity}{end}", one * scale, n=60, arm=ARM, stderr=error, **place))
        for quantity, value in {
            "gradient_coupling_random_sd": 0.05, "fisher_sensitivity_random": 1.0,
            "fisher_sensitivity_random_sd": 0.1, "fisher_sensitivity_output": 9.0,
        }.items():  # fmt: skip
            rows.append(row(quantity, value, n=39, arm=ARM, **place))
        for space in ("output_top", "output_bottom"):
            for end, one in (("", 0.3), ("_low", 0.2), ("_high", 0.4)):
                rows.append(row(f"overlap{end}", one, n=60, k=4, arm=ARM, **{**place, "subspace": space}))
        at = "heldout@0.15/known"
        rows.append(row("components_difference", 0.4, n=48, arm=at, **place))
        rows.append(row("components_difference_p_value", 0.05, n=39, arm=at, **place))
        for group in ("known", "heldout"):
            for quantity in ("mle_dimension_calibrated", "persistence_entropy", "longest_loop"):
                for end in ("", "_low", "_high"):
                    rows.append(row(f"{quantity}{end}", 1.0, n=60, arm=group, **place))
            for threshold in ("0.1", "0.15"):
                for end in ("", "_low", "_high"):
                    rows.append(row(f"components{end}", 0.5, n=48, arm=f"{group}@{threshold}", **place))
    return rows


def bypassed(change=0.6, p=0.05):
    rows = []
    for effect, value in (("abstention_change", change), ("false_abstention_change", 0.1)):
        place = {"step": 0, "layer": 1, "subspace": "residual"}
        rows.append(row(effect, value, n=60, stderr=0.05, arm="bypass@4", **place))
        rows += [
            row(effect, 0.05 * draw, n=60, stderr=0.05, arm=f"random.{draw}@4", **place) for draw in range(3)
        ]
        rows.append(row(f"{effect}_p_value", p, n=3, arm="bypass@4/random", **place))
    return tabulate(rows)


def verdicts(**tables):
    return {line.claim: line.verdict for line in lines(tables)}


def test_a_table_in_which_all_is_as_the_paper_says_agrees():
    found = lines({"uncertainty": tabulate(probed()), "bypass": bypassed()})
    assert [line.claim for line in found] == [*CLAIMS, COUPLED]
    assert {line.verdict for line in found} == {"agrees"}
    assert (
        "AUROC 0.909" in found[0].evidence
        and "abstention +0.60, false abstention +0.10" in found[-1].evidence
    )


@pytest.mark.parametrize(
    ("number", "changed"),
    [
        (0, {"auroc_logistic": (0.6, 0.4, 0.8)}),
        (1, {"mle_dimension_ratio": (1.5, 1.3, 1.7)}),
        (4, {"fisher_ratio": (0.9, 0.7, 1.1)}),
        (5, {"gradient_coupling": (0.5, 0.4, 0.6)}),
    ],
)
def test_a_number_on_the_other_side_disagrees(number, changed):
    found = verdicts(uncertainty=tabulate(probed(changed)))
    assert [claim for claim, verdict in found.items() if verdict == "disagrees"] == [CLAIMS[number]]
    assert found[COUPLED] == "not tested here"


def test_a_bypass_that_does_no_more_than_its_controls_disagrees():
    assert verdicts(bypass=bypassed(change=0.08))[COUPLED] == "disagrees"
    assert verdicts(bypass=bypassed(p=0.5))[COUPLED] == "disagrees"
    assert verdicts(bypass=bypassed())[CLAIMS[0]] == "not tested here"


def test_the_figures_are_drawn_from_tables_alone():
    table = tabulate(probed())
    for figure, panels in ((profiles, 6), (topology, 3), (sensitivity, 1)):
        assert len(figure(table, 0).axes) == panels
    assert len(abstentions({"bypass": bypassed()}).axes) == 1


def test_the_bridge_sets_the_change_of_coupling_beside_the_rsf_of_the_update():
    after = probed({"fisher_ratio": (0.8, 0.7, 0.9)}, step=64)
    place = {"step": 64, "k": 4, "subspace": "prediction"}
    ratios = [
        row("ratio", value, n=1, layer=1, matrix=matrix, role=role, **place)
        for matrix, role, value in (("o", "write", 3.0), ("down", "write", 2.0), ("q", "read", 5.0))
    ]
    found = bridge(tabulate([*probed(), *after]), tabulate(ratios))
    assert isinstance(found, pd.DataFrame) and len(found) == 4  # a layer, two couplings, two pathways
    one = found[(found["quantity"] == "fisher_ratio") & (found["role"] == "write")].iloc[0]
    # (0.8 - 0.3) × 1.01 in layer 1; √(0.1² + 0.1²) = 0.1414; (3 + 2) / 2
    assert (one["layer"], round(one["change"], 6), round(one["stderr"], 4), one["rsf"]) == (
        1,
        0.505,
        0.1414,
        2.5,
    )
    assert len(bridge_figure(found).axes) == 2

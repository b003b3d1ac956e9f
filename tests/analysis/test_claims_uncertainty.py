import pandas as pd
import pytest
from asked import bypassed, probed

from weightgeom.analysis.bridge import bridge
from weightgeom.analysis.claims_uncertainty import CLAIMS, COUPLED, lines, tables_of_claims
from weightgeom.analysis.declared import EARLIER
from weightgeom.figures.uncertainty import abstentions, profiles, sensitivity, topology
from weightgeom.figures.uncertainty import bridge as bridge_figure
from weightgeom.table import row, tabulate


def verdicts(trained=False, **tables):
    return {line.claim: line.verdict for line in judged(tables, trained)}


def judged(tables, trained=False):
    table, edited = tables_of_claims(tables, EARLIER)
    return lines(table, list(edited.values()), trained)


def test_a_table_in_which_all_is_as_the_paper_says_agrees():
    lines = judged({"uncertainty": tabulate(probed()), "bypass": bypassed()})
    assert [line.claim for line in lines] == [*CLAIMS, COUPLED]
    assert {line.verdict for line in lines} == {"supported"}
    assert (
        "AUROC 0.909" in lines[0].evidence
        and "abstention +0.60, false abstention +0.10" in lines[-1].evidence
    )


@pytest.mark.parametrize(
    ("number", "changed", "verdict"),
    [
        (0, {"auroc_logistic_max_p_value": 0.075}, "inconclusive"),
        (1, {"mle_dimension_ratio": (1.5, 1.3, 1.7)}, "contradicted"),
        (4, {"fisher_ratio": (0.9, 0.7, 1.1)}, "inconclusive"),
        (4, {"fisher_ratio": (1.9, 1.7, 2.1)}, "contradicted"),
        (5, {"gradient_coupling": (0.5, 0.4, 0.6)}, "contradicted"),
    ],
)
def test_a_number_on_the_other_side_contradicts_and_one_on_neither_is_inconclusive(number, changed, verdict):
    verdict_of = verdicts(uncertainty=tabulate(probed(changed)))
    assert {
        claim: verdict for claim, verdict in verdict_of.items() if verdict not in ("supported", "not tested")
    } == {CLAIMS[number]: verdict}
    assert verdict_of[COUPLED] == "not tested"


def test_the_best_layer_is_judged_by_permutations_over_all_layers_and_not_by_its_own_interval():
    line = judged({"uncertainty": tabulate(probed({"auroc_logistic": (0.6, 0.4, 0.8)}))})[0]
    assert line.verdict == "supported" and "p 0.025 among the best layers of permuted labels" in line.evidence
    without = judged({"uncertainty": tabulate(probed({"auroc_logistic_max_p_value": None}))})[0]
    assert without.verdict == "not tested" and "set probe.uncertainty.refits=39" in without.evidence
    few = tabulate(probed())
    few.loc[few["quantity"] == "auroc_logistic_max_p_value", "n"] = 18  # at best p = 1/19 > 0.05
    assert judged({"uncertainty": few})[0].verdict == "not tested"


def test_a_claim_about_layers_needs_more_than_half_of_them():
    table = tabulate(probed())
    of_layer = (table["quantity"] == "fisher_ratio_high") & (table["layer"] == 0)
    table.loc[of_layer, "value"] = 1.2
    line = judged({"uncertainty": table})[4]
    assert (line.verdict, "below 1 in 1 of 2 layers" in line.evidence) == ("inconclusive", True)


def test_a_model_that_was_trained_is_judged_as_it_was_before():
    changed = {"auroc_logistic_max_p_value": 0.5}
    table = tabulate([*probed(), *probed(changed, step=64)])
    assert verdicts(uncertainty=table, trained=True)[CLAIMS[0]] == "supported"
    assert verdicts(uncertainty=table)[CLAIMS[0]] == "inconclusive"


def test_a_bypass_that_does_no_more_than_its_controls_is_inconclusive():
    line = judged({"bypass": bypassed()})[-1]
    assert (line.verdict, "p 0.05" in line.evidence) == ("supported", True)
    assert "bypass@4 in layer 1" in line.evidence
    # Every control has 0 in that layer; in layer 0, where it is best, it gains up to 0.2.
    assert verdicts(bypass=bypassed(change=0.25))[COUPLED] == "inconclusive"
    assert verdicts(bypass=bypassed(controls=9))[COUPLED] == "inconclusive"  # too few for p <= 0.05
    assert verdicts(bypass=bypassed())[CLAIMS[0]] == "not tested"


def test_the_figures_are_drawn_from_tables_alone():
    table = tabulate(probed())
    for figure, panels in ((profiles, 6), (topology, 3), (sensitivity, 1)):
        assert len(figure(table, 0).axes) == panels
    assert len(abstentions({"bypass": bypassed()}).axes) == 1


def test_the_bridge_pairs_the_change_of_coupling_with_the_rsf_of_the_update():
    after = probed({"fisher_ratio": (0.8, 0.7, 0.9)}, step=64)
    place = {"step": 64, "k": 4, "subspace": "prediction"}
    ratios = [
        row("ratio", value, n=1, layer=1, matrix=matrix, role=role, **place)
        for matrix, role, value in (("o", "write", 3.0), ("down", "write", 2.0), ("q", "read", 5.0))
    ]
    bridged = bridge(tabulate([*probed(), *after]), tabulate(ratios))
    assert isinstance(bridged, pd.DataFrame) and len(bridged) == 4  # a layer, two couplings, two pathways
    writes = bridged[(bridged["quantity"] == "fisher_ratio") & (bridged["role"] == "write")].iloc[0]
    # (0.8 - 0.3) × 1.01 in layer 1; √(0.1² + 0.1²) = 0.1414; (3 + 2) / 2
    assert (writes["layer"], round(writes["change"], 6), round(writes["stderr"], 4), writes["rsf"]) == (
        1,
        0.505,
        0.1414,
        2.5,
    )
    assert len(bridge_figure(bridged).axes) == 2


def test_a_point_of_the_bridge_is_a_training_where_there_are_several():
    pair = bridge(tabulate([*probed(), *probed(step=64)]), tabulate([
        row("ratio", 2.0, n=1, layer=layer, matrix=matrix, role=role, step=64, k=4, subspace="prediction")
        for layer in (0, 1) for matrix, role in (("o", "write"), ("q", "read"))
    ]))  # fmt: skip
    runs = pd.concat([pair.assign(run=run) for run in ("sft", "dpo")])
    figure = bridge_figure(runs)
    points = [len(bars.lines[0].get_xdata()) for bars in figure.axes[0].containers]  # pyright: ignore
    assert points == [1, 1, 1, 1]  # two trainings, two pathways

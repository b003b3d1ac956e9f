import pandas as pd
import pytest
from rich.console import Console
from rich.table import Table

from runners.summary.terminal import rendered
from weightgeom.analysis.chain import between, comparisons, side_by_side
from weightgeom.analysis.summaries import by_stage
from weightgeom.bases.chain import Chain, check_chain
from weightgeom.declarations import ProbeDeclaration
from weightgeom.table import COLUMNS, own, row, tabulate

NAMES = ["base", "sft", "dpo"]
RATIO = {"rsf": "ratio"}


def rsf(steps: dict[int, tuple[float, float]], intervals: bool = True) -> pd.DataFrame:
    """Ratios of q in two layers by step, with nulls of sd 0.3 and 0.4, and an update of norm 3 and 4."""
    rows = []
    for step, ratios in steps.items():
        for layer, ratio in enumerate(ratios):
            place = {"step": step, "layer": layer, "matrix": "q", "role": "read"}
            at = place | {"subspace": "attention_input", "k": 4}
            rows += [
                {**place, **row("delta_norm", 3.0 + layer, n=64)},
                {**at, **row("ratio", ratio, n=64)},
                {**at, **row("null_ratio_mean", 1.0, n=64)},
                {**at, **row("null_ratio_sd", 0.3 + 0.1 * layer, n=64)},
                {**at, "subspace": "random", **row("ratio", 99.0, n=64)},
                {**at, "k": 8, **row("ratio", 99.0, n=64)},
                {**at, "head": 0, **row("ratio", 99.0, n=64)},
                {**place, "head": 0, **row("delta_norm", 99.0, n=64)},
            ]
            if intervals:
                rows += [
                    {**at, **row(f"ratio_{end}", ratio + by, n=64)}
                    for end, by in (("low", -0.5), ("high", 1.5))
                ]
        # Of the mean over the two layers, which share directions.
        of_mean = {"step": step, "matrix": "q", "role": "read", "subspace": "attention_input", "k": 4}
        rows.append({**of_mean, **row("ratio_mean_null_sd", 0.25, n=2)})
    table = tabulate(rows)
    table.attrs["stages"] = NAMES
    return table


@pytest.fixture
def tables() -> dict[str, pd.DataFrame]:
    return {"rsf": rsf({1: (2.0, 4.0), 2: (5.0, 7.0)}), "rsf_stages": rsf({1: (2.0, 4.0), 2: (1.0, 2.0)})}


def test_the_comparison_has_the_mean_over_layers_with_its_null_and_interval(tables):
    rows = side_by_side(tables, RATIO)
    assert list(rows) == ["probe", "stage", "against", *(name for name in COLUMNS if name != "against")]
    means = rows[rows["layer"].isna()].set_index(["stage", "against", "quantity"])
    values = means["value"].to_dict()
    # base -> sft: the mean of 2 and 4, which has no error, as layers are no repetitions, and its null's sd
    assert values["sft", "base", "ratio"] == 3.0
    assert pd.isna(means.loc[("sft", "base", "ratio"), "stderr"])
    assert means.loc[("sft", "base", "ratio"), "n"] == 2
    assert values["sft", "base", "null_ratio_sd"] == pytest.approx(0.25)
    assert values["sft", "base", "z"] == pytest.approx(8.0)
    assert (values["sft", "base", "ratio_low"], values["sft", "base", "ratio_high"]) == (2.5, 4.5)
    assert values["sft", "base", "delta_norm"] == 5.0
    assert (values["dpo", "base", "ratio"], values["dpo", "sft", "ratio"]) == (6.0, 1.5)
    assert set(means["unit"]) == {"1"} and set(means["step"]) == {1, 2}
    assert not rows["quantity"].str.startswith("ratio_mean").any()


def test_a_mean_whose_null_is_not_in_the_table_has_the_layers_own_as_if_they_varied_together(tables):
    for name, table in tables.items():
        tables[name] = table[table["quantity"] != "ratio_mean_null_sd"]
    rows = side_by_side(tables, RATIO)
    of_means = rows[rows["layer"].isna() & (rows["quantity"] == "null_ratio_sd")]["value"]
    assert of_means.tolist() == pytest.approx([0.35] * 3)  # of 0.3 and 0.4


def test_the_layers_are_in_the_table_of_their_mean_and_the_first_stage_is_there_once(tables):
    rows = side_by_side(tables, RATIO).query("quantity == 'ratio'")
    layers = rows[rows["layer"].notna()].groupby(["stage", "against"], sort=False)["value"].agg(list)
    assert layers.to_dict() == {("sft", "base"): [2, 4], ("dpo", "base"): [5, 7], ("dpo", "sft"): [1, 2]}


def test_what_has_no_interval_or_did_not_move_has_no_row_of_it(tables):
    tables["rsf_stages"] = rsf({1: (2.0, 4.0), 2: (1.0, 2.0)}, intervals=False)
    of_dpo = tables["rsf"]["step"] == 2
    tables["rsf"] = tables["rsf"][~of_dpo | (tables["rsf"]["quantity"] == "delta_norm")]
    tables["rsf"].attrs["stages"] = NAMES
    rows = side_by_side(tables, RATIO)
    means = rows[rows["layer"].isna()].groupby(["stage", "against"])["quantity"].agg(set).to_dict()
    assert means["dpo", "base"] == {"delta_norm"}
    assert not means["dpo", "sft"] & {"ratio_low", "ratio_high"}


def test_the_terminal_shows_every_comparison_by_name(tables):
    console = Console(width=120)
    with console.capture() as captured:
        console.print(rendered(by_stage(side_by_side(tables, RATIO), "ratio", ".2f"), "stages", Table))
    lines = [line.strip("│").split("│") for line in captured.get().splitlines() if line.startswith("│")]
    shown = [[cell.strip() for cell in line] for line in lines]
    # z of the mean: (3 - 1) / 0.25; ‖dW‖ = √(3² + 4²)
    assert shown == [
        ["sft", "base", "3.00 (8.0)", "5"],
        ["dpo", "base", "6.00 (20.0)", "5"],
        ["dpo", "sft", "1.50 (2.0)", "5"],
    ]


def test_the_ends_of_pairs_are_numbered_by_their_stage():
    pairs = [rsf({0: (9.0, 9.0), 1: (n, n)}) for n in (2.0, 3.0)]
    ratios = own(between(pairs), "ratio")
    assert ratios[["step", "value"]].drop_duplicates().to_numpy().tolist() == [[1, 2], [2, 3]]


def test_a_comparison_has_the_rows_of_its_stage_and_of_the_start(tables):
    compared = [(before, after, sorted(set(part["step"]))) for before, after, part in comparisons("rsf", rsf({
        0: (1.0, 1.0), 1: (2.0, 2.0), 2: (3.0, 3.0)
    }), NAMES)]  # fmt: skip
    assert compared == [("base", "sft", [0, 1]), ("base", "dpo", [0, 2])]
    between_stages = [pair[:2] for pair in comparisons("rsf_stages", tables["rsf_stages"], NAMES)]
    assert between_stages == [("sft", "dpo")]


def test_what_is_not_defined_on_a_chain_is_refused():
    ratio, moments = ProbeDeclaration("ratio"), ProbeDeclaration("measured", needs_objective=True)
    stages = {"base": "lab/a@v1", "sft": "lab/b@v1"}
    chain = Chain(stages)
    check_chain(chain, {"rsf": ratio}, [])
    check_chain(Chain(stages, from_="sft"), {"moments": moments}, ["rank1"])
    with pytest.raises(
        ValueError,
        match=r"intervention\.rank1 edits one model, but a chain has several: set model\.from=STAGE"
        " to edit one of base, sft",
    ):
        check_chain(chain, {"rsf": ratio}, ["rank1"])
    with pytest.raises(
        ValueError,
        match=r"probe\.moments needs the training objective.* such as"
        r" \+objective@probe\.moments\.objective=dpo.* such as probe=\[rsf\]",
    ):
        check_chain(chain, {"rsf": ratio, "moments": moments}, [])

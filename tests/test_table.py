import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from weightgeom.table import (
    ADDED,
    COLUMNS,
    apart,
    arm_columns,
    at_own_subspaces,
    joined,
    label,
    row,
    tabulate,
    upgraded,
    whole_matrices,
)

ARM = arm_columns("random", "0.1", draw=3)
WHERE = {"step": 4, "layer": 1, "matrix": "q"}


def test_a_row_becomes_a_line_of_the_table_with_its_place():
    rows = [
        row("ratio", 2.0, n=7, k=3, role="read", subspace="random", head=5, **WHERE, **ARM),
        row("loss", 1.5, n=5, unit="nats", stderr=0.25, step=0),
    ]
    table = tabulate(iter(rows))
    assert list(table.columns) == list(COLUMNS)
    first, second = table.drop(columns=["stderr", "expert"]).to_dict("records")
    assert first == {
        "step": 4,
        "layer": 1,
        "matrix": "q",
        "head": 5,
        "parameter": "",
        "token": "",
        "role": "read",
        "arm": "random.3@0.1",
        "treatment": "random",
        "draw": 3,
        "dose": "0.1",
        "against": "",
        "subspace": "random",
        "k": 3,
        "quantity": "ratio",
        "unit": "1",
        "value": 2.0,
        "n": 7,
    }
    assert table["stderr"].fillna(-1.0).tolist() == [-1.0, 0.25]
    assert (second["unit"], second["value"], second["n"]) == ("nats", 1.5, 5)
    text = ("matrix", "parameter", "token", "role", "arm", "treatment", "dose", "against", "subspace")
    assert [second[name] for name in text] == [""] * 9
    missing = table[["layer", "head", "expert", "draw", "k"]].fillna(-1)
    assert missing.to_numpy().tolist() == [[1, 5, -1, 3, 3], [-1] * 5]


@pytest.mark.parametrize("rows", [[], [row("loss", 1.0, n=1, step=0)], [row("a", 1.0, n=1, k=2, **WHERE)]])
def test_the_types_of_the_columns_do_not_depend_on_the_rows(rows):
    assert {name: str(dtype) for name, dtype in tabulate(rows).dtypes.items()} == COLUMNS


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["value", "stderr"])
def test_a_number_that_is_not_finite_is_refused_with_its_place(bad, name):
    rows = [row("ratio", 1.0, n=1, **WHERE), row("z", 1.0, n=1, stderr=1.0, **WHERE) | {name: bad}]
    rows = [row | {"head": 2} for row in rows]
    message = "1 values are not finite, the first z of matrix 'q.2' in layer 1 at step 4"
    with pytest.raises(ValueError, match=message):
        tabulate(rows)


def test_an_unknown_column_is_refused():
    with pytest.raises(ValueError, match=r"unknown table columns \['lair'\]; a table has \['step', 'layer',"):
        tabulate([row("ratio", 1.0, n=1, lair=2, step=0)])


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("activation@0.03", arm_columns("activation", "0.03")),
        ("random.12@0.3", arm_columns("random", "0.3", draw=12)),
        ("random_k.0@remove", arm_columns("random_k", "remove", draw=0)),
        ("top@remove/random_k", arm_columns("top", "remove", against="random_k")),
        ("delta@transplant", arm_columns("delta", "transplant")),
        ("unedited", arm_columns("unedited")),
        ("held.out", arm_columns("held.out")),
        ("heldout/known", arm_columns("heldout", against="known")),
        ("heldout@0.15/known", arm_columns("heldout", "0.15", against="known")),
        ("known@0.15", arm_columns("known", "0.15")),
        ("", arm_columns("")),
    ],
)
def test_an_arm_is_called_by_its_parts_and_an_earlier_versions_name_gives_them_back(name, columns):
    assert columns["arm"] == name
    earlier = tabulate([row("z", 1.0, n=1, step=0, arm=name)]).drop(columns=list(ADDED))
    assert_frame_equal(upgraded(earlier), tabulate([row("z", 1.0, n=1, step=0, **columns)]))


def test_a_table_of_an_earlier_version_has_todays_columns():
    names = ["q", "q.3", "o.0", "up.5", "down.11", "router", "q+k", ""]
    parts = [
        {"matrix": "q"},
        {"matrix": "q", "head": 3},
        {"matrix": "o", "head": 0},
        {"matrix": "up", "expert": 5},
        {"matrix": "down", "expert": 11},
        {"matrix": "router"},
        {"matrix": "q+k"},
        {},
    ]
    rows = [row("ratio", 2.0, n=7, step=1, layer=2, k=4, role="read", subspace="x") for _ in parts]
    today = tabulate([row | part for row, part in zip(rows, parts, strict=True)])
    earlier = pd.DataFrame(
        {
            "step": [1] * 8,
            "layer": pd.array([2] * 8, dtype="Int64"),
            "matrix": names,
            "role": "read",
            "arm": "",
            "subspace": "x",
            "k": pd.array([4] * 8, dtype="Int64"),
            "quantity": "ratio",
            "unit": "1",
            "value": 2.0,
            "stderr": pd.array([None] * 8, dtype="Float64"),
            "n": 7,
        }
    )
    earlier.attrs["at"] = "start"
    upgraded_table = upgraded(earlier)
    assert_frame_equal(upgraded_table, today)
    assert upgraded_table.attrs == {"at": "start"} and list(earlier["matrix"]) == names
    assert label(upgraded_table).tolist() == names
    assert upgraded(today) is today


def test_an_empty_table_of_an_earlier_version_has_todays_columns():
    empty = tabulate([])
    assert_frame_equal(upgraded(empty.drop(columns=list(ADDED))), empty)


def test_the_comparison_of_stages_of_an_earlier_version_keeps_its_stages():
    table = tabulate([row("ratio", 1.0, n=1, step=1)]).drop(columns=list(ADDED))
    upgraded_table = upgraded(table.assign(stage="dpo", against="sft"))
    assert upgraded_table["against"].tolist() == ["sft"] and upgraded_table["stage"].tolist() == ["dpo"]


def test_a_file_that_is_no_table_stays_as_it_is():
    other = pd.DataFrame({"a": [1]})
    assert upgraded(other) is other


def test_heads_random_subspaces_and_other_parameters_are_no_matrix_at_its_own_subspace_and_experts_are():
    places = [
        {"subspace": "mlp_input"},
        {"subspace": "mlp_input", "head": 0},
        {"subspace": "mlp_input", "expert": 0},
        {"subspace": "random"},
        {},
        {"subspace": "prediction", "parameter": "embed.weight"},
    ]
    table = tabulate(row("ratio", 1.0, n=n, step=0, matrix="up", **place) for n, place in enumerate(places))
    assert whole_matrices(table)["n"].tolist() == [0, 2, 3, 4]
    assert at_own_subspaces(table)["n"].tolist() == [0, 2]


def test_means_and_other_parameters_are_kept_in_tables_of_their_own_and_joined_again() -> None:
    q = row("ratio", 2.0, n=1, step=0, matrix="q", layer=0, role="read", subspace="attention_input", k=1)
    mean = row("ratio_mean", 2.0, n=1, step=0, matrix="", role="read", subspace="attention_input", k=1)
    norm = row("delta_norm", 1.0, n=1, step=0, matrix="norm", parameter="model.norm.weight")
    table = tabulate([mean, q, norm])
    parts = apart(table, "ratio")
    assert {suffix: part["quantity"].tolist() for suffix, part in parts.items()} == {
        "": ["ratio"],
        "_means": ["ratio_mean"],
        "_parameters": ["delta_norm"],
    }
    assert list(apart(tabulate([q]), "ratio")) == [""]
    kept = {f"rsf{suffix}": part for suffix, part in parts.items()}
    assert joined(kept)["rsf"]["quantity"].tolist() == ["ratio", "ratio_mean", "delta_norm"]
    assert list(joined({**kept, "spectrum": table})) == ["rsf", "spectrum"]

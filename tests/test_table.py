import pytest

from weightgeom.table import COLUMNS, row, tabulate

WHERE = {"step": 4, "layer": 1, "matrix": "q"}


def test_a_row_becomes_a_line_of_the_table_with_its_place():
    rows = [
        row("ratio", 2.0, n=7, k=3, role="read", subspace="random", arm="top", **WHERE),
        row("loss", 1.5, n=5, unit="nats", stderr=0.25, step=0),
    ]
    table = tabulate(iter(rows))
    assert list(table.columns) == list(COLUMNS)
    first, second = table.drop(columns="stderr").to_dict("records")
    assert first == {
        "step": 4,
        "layer": 1,
        "matrix": "q",
        "role": "read",
        "arm": "top",
        "subspace": "random",
        "k": 3,
        "quantity": "ratio",
        "unit": "1",
        "value": 2.0,
        "n": 7,
    }
    assert table["stderr"].fillna(-1.0).tolist() == [-1.0, 0.25]
    assert (second["unit"], second["value"], second["n"]) == ("nats", 1.5, 5)
    assert [second[name] for name in ("matrix", "role", "arm", "subspace")] == [""] * 4
    assert table["layer"].fillna(-1).tolist() == [1, -1] and table["k"].fillna(-1).tolist() == [3, -1]


@pytest.mark.parametrize("rows", [[], [row("loss", 1.0, n=1, step=0)], [row("a", 1.0, n=1, k=2, **WHERE)]])
def test_the_types_of_the_columns_do_not_depend_on_the_rows(rows):
    assert {name: str(dtype) for name, dtype in tabulate(rows).dtypes.items()} == COLUMNS


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["value", "stderr"])
def test_a_number_that_is_not_finite_is_refused_with_its_place(bad, name):
    rows = [row("ratio", 1.0, n=1, **WHERE), row("z", 1.0, n=1, stderr=1.0, **WHERE) | {name: bad}]
    message = "1 values are not finite, the first z of matrix 'q' in layer 1 at step 4"
    with pytest.raises(ValueError, match=message):
        tabulate(rows)


def test_an_unknown_column_is_refused():
    with pytest.raises(ValueError, match=r"unknown table columns \['lair'\]; a table has \['step', 'layer',"):
        tabulate([row("ratio", 1.0, n=1, lair=2, step=0)])

import json
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from rich.table import Table

from runners.summary.curves import log_effects
from runners.summary.terminal import effects_shown, rendered
from runners.tracking.record import Record
from weightgeom.analysis.comparisons import compared_with_principal, comparisons, measured_effect
from weightgeom.declarations import InterventionDeclaration
from weightgeom.table import arm_columns, row, tabulate

KL = "kl_from_unedited"
BY_KL = InterventionDeclaration((KL,), ("random", "random_k"))
BY_MARGIN = InterventionDeclaration(("preference_margin_change", KL), ("random_k",))


def arms(place: dict, dose: str, treatment: float, controls: dict[str, list[float]], p: dict[str, float]):
    """The rows that `trials.measured` gives for one trial."""
    yield row(KL, treatment, n=8, unit="nats/token", **arm_columns("top", dose), **place)
    for kind, values in controls.items():
        for draw, value in enumerate(values):
            yield row(KL, value, n=8, unit="nats/token", **arm_columns(kind, dose, draw=draw), **place)
    for kind, value in p.items():
        yield row(f"{KL}_p_value", value, n=3, **arm_columns("top", dose, against=kind), **place)
        yield row(f"{KL}_q_value", 2 * value, n=3, **arm_columns("top", dose, against=kind), **place)


@pytest.fixture
def layered() -> pd.DataFrame:
    rows = []
    for layer in (0, 1):
        place = {"step": 0, "layer": layer, "matrix": "k", "role": "read", "k": 4, "subspace": "prediction"}
        controls = {"random": [1.0, 3.0, 2.0], "bottom": [0.0], "within": [4.0, 6.0]}
        for dose, strength in (("0.1", 1.0), ("0.3", 10.0)):
            p = {"random": 0.25, "within": 0.1}
            rows += arms(place, dose, strength * (5 + layer), controls, p)
    return tabulate(rows)


@pytest.fixture
def over_k() -> pd.DataFrame:
    rows = []
    for k in (1, 16):
        place = {"step": 64, "matrix": "", "role": "write", "k": k, "subspace": "prediction"}
        for dose in ("remove", "keep"):
            p = {"random_k": 0.5, "random_energy": 0.05}
            rows += arms(place, dose, k / 2, {"random_k": [0.5], "random_energy": [0.25]}, p)
    return tabulate(rows)


def test_a_comparison_has_the_treatments_effect_and_the_median_of_its_own_controls(layered) -> None:
    compared = comparisons(layered, KL)
    assert len(compared) == 8  # 2 layers x 2 doses x the two kinds that have a p-value
    by_kind = compared[(compared["layer"] == 1) & (compared["dose"] == "0.3")].set_index("against")
    assert by_kind.loc["random", ["effect", "controls", "p_value", "q_value"]].tolist() == [60, 2, 0.25, 0.5]
    assert by_kind.loc["within", ["effect", "controls", "p_value", "q_value"]].tolist() == [60, 5, 0.1, 0.2]


def test_places_without_a_layer_are_told_apart_by_their_dimension(over_k) -> None:
    compared = comparisons(over_k, KL)
    removed = compared[(compared["dose"] == "remove") & (compared["against"] == "random_energy")]
    assert dict(zip(removed["k"], removed["effect"], strict=True)) == {1: 0.5, 16: 8}
    assert removed["controls"].tolist() == [0.25, 0.25]


def logged(record: Record) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    for line in (record.directory / "metrics.jsonl").read_text().splitlines():
        point = json.loads(line)
        curves.setdefault(point["key"], {})[point["step"]] = point["value"]
    return curves


@pytest.fixture
def record(tmp_path: Path) -> Record:
    asked = {"experiment": "e", "name": "n", "params": {}, "tags": {}, "inputs": []}
    return Record.create(tmp_path / "record", tracking_uri="sqlite:////tmp/none.db", **asked)


def test_profiles_over_layers_are_of_the_largest_dose_and_of_random_controls(layered, record) -> None:
    log_effects(record, "rank1", layered, BY_KL)
    assert logged(record) == {
        "rank1_by_layer/k": {0: 50, 1: 60},
        "rank1_by_layer/k_p_value": {0: 0.25, 1: 0.25},
    }


def test_curves_over_k_are_of_every_operation(over_k, record) -> None:
    log_effects(record, "surgery", over_k, BY_KL)
    assert logged(record) == {
        "surgery/write_remove": {1: 0.5, 16: 8},
        "surgery/write_remove_p_value": {1: 0.5, 16: 0.5},
        "surgery/write_keep": {1: 0.5, 16: 8},
        "surgery/write_keep_p_value": {1: 0.5, 16: 0.5},
    }


def test_the_terminal_shows_an_effect_with_its_controls(layered) -> None:
    console = Console(width=200, record=True)
    title, short = effects_shown("rank1", layered, BY_KL)
    console.print(rendered(short, title, Table))
    text = console.export_text()
    title = "Rank1 (rank1): kl_from_unedited (nats/token) against the median of random controls"
    assert title in " ".join(text.split())
    (line,) = [line for line in text.splitlines() if "60" in line]
    assert [part.strip() for part in line.split("│")[1:-1]] == [
        *("k", "1", "4", "top@0.3", "60", "2", "0.25", "0.5"),
    ]


def test_data_without_pairs_are_told_of_by_the_divergence(over_k, record) -> None:
    log_effects(record, "surgery", over_k, BY_MARGIN)
    assert "surgery/write_remove" in logged(record)
    console = Console(width=200, record=True)
    title, short = effects_shown("surgery", over_k, BY_MARGIN)
    console.print(rendered(short, title, Table))
    assert "Surgery (surgery): kl_from_unedited" in console.export_text()


def test_an_effect_that_no_row_has_is_refused_with_those_that_there_are(layered) -> None:
    with pytest.raises(
        ValueError, match=r"none of the declared effects loss was measured; the table has kl_fr"
    ):
        measured_effect(layered, ("loss",))


def test_the_principal_control_is_the_first_that_is_declared(layered) -> None:
    kinds = list(comparisons(layered, KL)["against"].unique())
    for kind in kinds:
        assert set(compared_with_principal(layered, KL, (kind,))["against"]) == {kind}
    assert len(kinds) > 1

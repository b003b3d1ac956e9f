"""The note of a sweep, in words."""

from pathlib import Path

import pandas as pd

from runners.summary.note import note
from runners.tracking.record import Record


def record(directory: Path, name: str, **params: object) -> Record:
    asked = {"experiment": "e", "tags": {}, "inputs": [], "tracking_uri": "sqlite:///x.db"}
    return Record.create(directory / "record", name=name, params=params, **asked)  # pyright: ignore[reportArgumentType]


def test_the_note_tells_what_was_run_what_did_not_end_well_and_what_came_out(tmp_path):
    sweep = record(tmp_path, "sweep", overrides="objective=ce,dpo seed=0,1")
    children = [
        record(tmp_path / f"{n}", f"{o} seed={n % 2}") for n, o in enumerate(["ce", "ce", "dpo", "dpo"])
    ]
    for child in children[:3]:
        child.end("FINISHED")
    children[3].end("FAILED", "ValueError: training diverged")
    children.append(Record(tmp_path / "4" / "record"))
    ratios = [
        ("ce", "0", "q", "read", 5.0),
        ("ce", "0", "o", "write", 3.0),
        ("ce", "0", "down", "write", 4.0),
    ]
    ratios += [
        ("ce", "1", "q", "read", 5.2),
        ("ce", "1", "o", "write", 3.5),
        ("ce", "1", "down", "write", 3.9),
    ]
    ratios += [("dpo", "0", "q", "read", 5.4), ("dpo", "0", "o", "write", 1.2)]
    columns = ["run", "seed", "matrix", "role", "value"]
    table = pd.DataFrame(ratios, columns=columns).assign(quantity="ratio")
    losses = [("ce", "0", "", "", 2.0, "train/loss"), ("ce", "1", "", "", 2.5, "train/loss")]
    table = pd.concat([table, pd.DataFrame(losses, columns=[*columns, "quantity"])])
    lines = note(sweep, children, table, {"write": (0.62, 0.001)}).splitlines()
    assert lines[:4] == [
        "**sweep**: 5 runs.",
        "3 of 5 finished. The others:",
        "- dpo seed=1: FAILED, ValueError: training diverged",
        "- 4: never started",
    ]
    # write of ce: seeds 3.5 and 3.7, mean 3.6, standard error 0.1; read 5.0 and 5.2, the same
    assert "- **ce** (2 runs): read 5.10 ± 0.20, write 3.60 ± 0.20; loss 2.25" in lines
    assert "- **dpo** (1 run): read 5.40, write 1.20" in lines
    assert "- The write side is lowest in dpo (1.20) and highest in ce (3.60)." in lines
    assert any("rank correlation of the write ratio" in line and "0.62 (p = 0.001)" in line for line in lines)


def test_a_sweep_of_which_nothing_finished_says_so_and_no_more(tmp_path):
    sweep, child = record(tmp_path, "sweep", overrides="seed=0"), record(tmp_path / "0", "dpo")
    child.end("KILLED", "SystemExit: 143")
    lines = note(sweep, [child], pd.DataFrame(columns=["run", "quantity"]), {})
    result = "**sweep**: 1 run.\n0 of 1 finished. The others:\n- dpo: KILLED, SystemExit: 143"
    assert lines == f"{result}\n\nAsked for: seed=0"

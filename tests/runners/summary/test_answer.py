# pyright: reportArgumentType=false, reportAssignmentType=false
import logging

import pandas as pd
import pytest

from runners.summary.answer import answer
from runners.summary.note import run_note
from runners.summary.warned import Warned, warnings
from weightgeom.declarations import ProbeDeclaration
from weightgeom.probes.behaviour import Behaviour
from weightgeom.probes.rsf import RSF
from weightgeom.table import row, tabulate

PLAIN = ProbeDeclaration("gap", label="the gap", form=".2f")


def measured(step: int, layer: int, matrix: str, ratio: float, quantity: str = "ratio") -> list[dict]:
    role = "write" if matrix == "o" else "read"
    at = {"layer": layer, "matrix": matrix, "role": role, "subspace": "prediction", "k": 4}
    values = {quantity: ratio, "fraction": ratio / 8}
    values |= {f"null_{quantity}_mean": 1.0, f"null_{quantity}_sd": 0.1}
    return [{"step": step, **row(name, value, n=9, **at)} for name, value in values.items()]


@pytest.fixture
def rsf() -> pd.DataFrame:
    ratios = {("q", 0): 5.0, ("q", 1): 6.0, ("o", 0): 1.25, ("o", 1): 1.25}
    early = [row for matrix, layer in ratios for row in measured(1, layer, matrix, 2.0)]
    late = [row for (matrix, layer), ratio in ratios.items() for row in measured(2, layer, matrix, ratio)]
    joint = [
        {"step": step, "role": role, "k": 4, **row("ratio_mean_null_sd", sd, n=2)}
        for step in (1, 2)
        for role, sd in (("read", 0.05), ("write", 0.07))
    ]
    return tabulate([*early, *late, *joint])


def test_the_answer_is_the_headline_at_the_end_in_multiples_of_chance(rsf: pd.DataFrame) -> None:
    # Two standard deviations of the write pathway's mean, the wider of the two.
    sentence = "read 5.5 times chance, write 1.2 times, of at most 8; null 1 ± 0.1"
    assert answer({"rsf": rsf}, {"rsf": RSF.declaration}) == sentence
    earlier = rsf[rsf["quantity"] != "ratio_mean_null_sd"]  # as if both layers varied together
    assert answer({"rsf": earlier}, {"rsf": RSF.declaration}) == sentence.replace("0.1", "0.2")


def test_a_probe_that_is_no_multiple_of_chance_answers_by_its_label() -> None:
    table = tabulate(row for layer in (0, 1) for row in measured(1, layer, "q", 2.0 + layer, "gap"))
    assert answer({"mine": table}, {"mine": PLAIN}) == "the gap: read 2.50; null 1 ± 0.2"


def test_multiples_of_chance_come_before_other_headlines(rsf: pd.DataFrame) -> None:
    other = tabulate(measured(2, 0, "q", 3.0, "gap"))
    sentence = answer({"mine": other, "rsf": rsf}, {"mine": PLAIN, "rsf": RSF.declaration})
    assert sentence.startswith("read 5.5 times chance")


def test_a_chain_is_answered_stage_by_stage(rsf: pd.DataFrame) -> None:
    rsf.attrs["stages"] = ["base", "sft", "dpo"]
    assert answer({"rsf_stages": rsf, "rsf": rsf}, {"rsf": RSF.declaration}) == (
        "sft after base: read 2.0 times chance, write 2.0 times;"
        " dpo after sft: read 5.5 times chance, write 1.2 times, of at most 8; null 1 ± 0.1"
    )


def test_equal_checkpoints_are_said_to_be_equal() -> None:
    table = tabulate([{"step": 1, **row("delta_norm", 0.0, n=9, layer=0, matrix="q", role="read")}])
    assert answer({"rsf": table}, {"rsf": RSF.declaration}).startswith("nothing moved")
    table.attrs["ends"] = ["before", "after"]
    sentence = "the two checkpoints, before and after, are equal: no matrix differs"
    assert answer({"rsf": table}, {"rsf": RSF.declaration}) == sentence


def test_without_a_headline_the_whole_model_answers() -> None:
    losses = {0: 6.5, 2: 5.25}
    table = tabulate(
        {"step": step, **row("heldout_ce", loss, n=9, unit="nats/token")} for step, loss in losses.items()
    )
    sentence = "heldout_ce from 6.5 to 5.25 nats/token"
    assert answer({"behaviour": table}, {"behaviour": Behaviour.declaration}) == sentence


def test_without_tables_there_is_no_answer() -> None:
    assert answer({"rsf": tabulate([])}, {"rsf": RSF.declaration}) == ""


def test_every_different_warning_is_kept_once_and_no_other_line() -> None:
    handler, log = Warned(), logging.getLogger("weightgeom.test")
    logging.getLogger().addHandler(handler)
    try:
        for count in (3, 3, 4):
            log.warning("dropped %d pairs", count)
        log.info("reusing it")
        log.error("lost")
        assert warnings() == ["dropped 3 pairs", "dropped 4 pairs", "lost"]
    finally:
        logging.getLogger().removeHandler(handler)


def test_the_note_of_a_run_is_its_answer_and_its_warnings() -> None:
    assert run_note("read 5.3 times chance", ["half is dropped"]) == (
        "**read 5.3 times chance**\n\n- warning: half is dropped"
    )
    assert run_note("", []) == ""

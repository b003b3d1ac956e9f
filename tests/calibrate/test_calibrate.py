from pathlib import Path

import pytest

from weightgeom.calibrate.__main__ import HEAD, line, main
from weightgeom.calibrate.simulations import Rate

PAGE = Path(__file__).parents[2] / "docs/concepts/calibration.md"


def test_a_rate_holds_where_its_interval_allows_for_the_nominal_one():
    assert Rate("p", "d 8", 0.05, 20, 400).holds
    assert Rate("p", "d 8", 0.05, 60, 400).holds is False
    assert Rate("p", "d 8", 0.05, 2, 400).holds is False  # 2 of 400 is too few for an exact p-value
    assert Rate("p", "d 8", 0.05, 1, 400, "at most").holds
    assert Rate("covers", "d 8", 0.9, 399, 400, "at least").holds
    assert Rate("covers", "d 8", 0.9, 300, 400, "at least").holds is False
    assert Rate("power", "d 8", None, 1, 400).holds is None


def test_a_row_has_the_rate_and_its_nominal_value():
    row = line(Rate("`p_value`", "d 128", 0.05, 60, 400))
    assert row.startswith("| `p_value` | d 128 | 0.05 | 0.150 [") and row.endswith("| **no** |")
    assert "at most 0.05" in line(Rate("`p_value`", "d 128", 0.05, 3, 400, "at most"))


@pytest.mark.slow
def test_every_rate_is_as_it_should_be_and_the_page_is_written(tmp_path, capsys):
    page = tmp_path / "calibration.md"
    assert main(["--draws", "12", "--d", "32", "--write", str(page)]) == 0
    rows = [row for row in page.read_text().splitlines() if row.startswith("| ")]
    assert len(rows) > 40 and f"{len(rows) - 1} rates, 0 not" in capsys.readouterr().err


def test_the_page_of_the_docs_is_what_the_command_writes():
    text = PAGE.read_text()
    assert text.startswith(HEAD.split("{draws}")[0]) and "**no**" not in text
    assert "python -m weightgeom.calibrate --draws" in text


@pytest.mark.parametrize("wrong", [["--draws", "0"], ["--d", "4"]])
def test_what_cannot_be_simulated_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        main(wrong)
    assert "--draws must be 1 or more" in capsys.readouterr().err

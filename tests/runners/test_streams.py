import io
import sys

from rich.console import Console

from runners.streams import replace_unprintable


def test_a_table_is_printed_in_an_encoding_without_its_characters(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    replace_unprintable()
    Console().print("1.5 ± 0.1 Δ")
    sys.stdout.flush()
    assert written.getvalue() == b"1.5 ? 0.1 ?\n"


def test_a_closed_output_stays_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    replace_unprintable()

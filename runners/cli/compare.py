"""Two checkpoints compared: the overrides for who does not know Hydra."""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString


def compared(before: str, after: str, texts: Sequence[Path], k: int | None, out: Path) -> list[str]:
    """The overrides that compare two checkpoints on the text of some files, in subspaces of dimension `k`."""
    return [
        "objective=none",
        "model=pair",
        f"model.before={quoted(before)}",
        f"model.after={quoted(after)}",
        "data=text",
        f"data.train=[{','.join(quoted(str(text)) for text in texts)}]",
        *([] if k is None else [f"probe.rsf.k={k}"]),
        f"outputs={quoted(str(out))}",
    ]


def quoted(text: str) -> str:
    """A value of an override that means this very text, whatever its characters mean to Hydra."""
    # ${ would start an interpolation, also within quotes; backslashes before it are doubled.
    plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(plain, Quote.single).with_quotes()

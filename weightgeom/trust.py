"""Whose own code may run: nobody's, but of the checkpoint directories that a user has said so of."""

from pathlib import Path

_trusted: set[str] = set()


def trust(directory: Path) -> None:
    """Let the code that lies in a checkpoint's directory run in this process; remembers it."""
    _trusted.add(str(directory))


def trusted(directory: Path | str) -> bool:
    """Whether the code in a checkpoint's directory may run."""
    return str(directory) in _trusted

"""How a training is asked from outside to save its state, or to save it and stop."""

from collections.abc import Callable
from typing import Literal

Wanted = Callable[[], Literal["save", "stop"] | None]
"""What is asked of a training; it looks between any two steps."""


class Interrupted(BaseException):
    """The work was asked to stop and has saved what it could: the same call goes on with it.

    No `Exception`, so that nothing on its way takes it for an error of its own.
    """


def undisturbed() -> None:
    """Nothing is asked of a training."""

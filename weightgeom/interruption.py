"""Requests to a running training: save a resumable state, or save one and stop."""

from collections.abc import Callable
from typing import Literal

Request = Callable[[], Literal["save", "stop"] | None]
"""Returns the pending request to a training, or None; the training polls it after every step."""


class Interrupted(BaseException):
    """The work stopped on request and saved its progress; the same call resumes it.

    A `BaseException`, so that no `except Exception` on the way swallows it.
    """


def no_request() -> None:
    """Return None: let the training run to its end."""

"""The type checker of jaxtyping's import hook: beartype, on the first calls of every function."""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from beartype import beartype

CALLS = 200  # of each function in a process: checks take longer than most functions with more calls
_checks: dict[Any, Callable[..., Any]] = {}
_calls: Counter[Any] = Counter()


def first_calls(function: Callable[..., Any]) -> Callable[..., Any]:
    """The check of a function that jaxtyping makes of another's signature; a function made anew shares it."""
    key = function.__module__, function.__qualname__, function.__code__.co_varnames
    if "<locals>" not in function.__qualname__:
        _checks.pop(key, None)

    def checked(*args: Any, **kwargs: Any) -> Any:
        check = _checks.get(key) or _checks.setdefault(key, beartype(function))  # only of what is called
        _calls[key] += 1
        if _calls[key] > CALLS:  # jaxtyping's wrapper, which is the caller, passes over a function so marked
            sys._getframe(1).f_locals["fn"].__no_type_check__ = True
        return check(*args, **kwargs)

    return checked

"""What went wrong, in one sentence a person can act on."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches

USER_ERRORS = (ValueError, KeyError, OSError, NotImplementedError, FloatingPointError)


def complaint(error: BaseException) -> str:
    """One sentence for any error: Hydra's, OmegaConf's, pydantic's or our own."""
    chain = list(_chain(error))
    names = {type(link).__name__: link for link in reversed(chain)}
    if "ValidationError" in names:
        return _invalid(names["ValidationError"], _group(chain))
    if "MissingConfigException" in names:
        return _unknown_choice(names["MissingConfigException"])
    for name in ("ConfigAttributeError", "ConfigKeyError"):
        if name in names:
            return _unknown_key(names[name])
    if "MissingMandatoryValue" in names:
        key = getattr(names["MissingMandatoryValue"], "full_key", None) or "a key"
        return f"{key} must be given: {key}=..."
    root = next((link for link in chain if isinstance(link, USER_ERRORS)), chain[-1])
    text = str(root.args[0] if isinstance(root, KeyError) and root.args else root)
    text = " ".join(text.split()) or "no message"
    if isinstance(root, USER_ERRORS) or type(error).__module__.startswith(("hydra", "omegaconf")):
        return text
    return f"{type(root).__name__}: {text} (the traceback: HYDRA_FULL_ERROR=1, or the run's traceback.txt)"


def nearest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'? It has a, b, c`: the valid names, the nearest of them first."""
    options = sorted(str(option) for option in valid)
    close = get_close_matches(name, options, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}valid: {', '.join(options)}"


def _invalid(error: BaseException, group: str) -> str:
    """Every wrong value of a pydantic ValidationError: where it is, what it should be and what it was."""
    found = []
    for problem in error.errors():  # pyright: ignore[reportAttributeAccessIssue]
        path = [str(part) for part in problem["loc"] if not _is_type(str(part))]
        where = ".".join([group, *path]).strip(".")
        if problem["type"] == "unexpected_keyword_argument":
            found.append(f"there is no key {where}")
        elif problem["type"] in ("value_error", "assertion_error"):
            found.append(f"{where}: {problem['ctx']['error']}" if where else str(problem["ctx"]["error"]))
        else:
            found.append(
                f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"
            )
    return "; ".join(dict.fromkeys(found))


def _is_type(part: str) -> bool:
    """Whether a part of pydantic's location names a member of a union and not a key."""
    return part in ("str", "int", "float", "bool") or "[" in part


def _unknown_choice(error: BaseException) -> str:
    missing = getattr(error, "missing_cfg_file", None)
    options = getattr(error, "options", None)
    if not missing or not options:
        return " ".join(str(error).split())
    group, _, choice = str(missing).rpartition("/")
    return f"there is no {group}={choice}; {nearest(choice, options)}"


def _unknown_key(error: BaseException) -> str:
    key, parent = str(getattr(error, "key", "")), getattr(error, "parent_node", None)
    full = str(getattr(error, "full_key", key) or key)
    valid = [str(name) for name in parent if name != "_target_"] if parent is not None else []
    return (
        f"there is no key {full}; {nearest(key.split('.')[-1], [name for name in valid if name != 'hydra'])}"
    )


def _group(chain: list[BaseException]) -> str:
    """The configuration group whose object could not be made, from Hydra's message."""
    for link in chain:
        for line in str(link).splitlines():
            if line.startswith("full_key: "):
                return line.removeprefix("full_key: ")
    return ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

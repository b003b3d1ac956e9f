"""Explanations of errors: the problem and its fix in one sentence."""

import errno
import os
import pwd
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import Any

PACKAGED = Path(__file__).with_name("conf")  # in a wheel; in a checkout the choices lie beside the packages
CONF = PACKAGED if PACKAGED.is_dir() else PACKAGED.parents[1] / "conf"
USER_ERRORS = (ValueError, KeyError, OSError, NotImplementedError, FloatingPointError)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def explanation(error: BaseException, key: str = "") -> str:
    """One sentence for any error: Hydra's, OmegaConf's, pydantic's or our own.

    `key` is the place in the configuration of the values that pydantic refuses.
    """
    chain = list(_chain(error))
    names = {type(link).__name__: link for link in reversed(chain)}
    if _is_ours(error):
        return _sentence(error)
    for name, explain in EXPLANATIONS.items():
        if name in names:
            return explain(names[name])
    for link in chain:
        if _library(link) == "pydantic_core":
            return _invalid(link, key)
    root = next((link for link in chain if _is_ours(link)), chain[-1])
    if _library(error) in ("hydra", "omegaconf") and not _is_ours(root):
        return _composition(error, root)
    sentence = _sentence(root)
    if _is_ours(root):
        return f"in {key}: {sentence}" if key else sentence
    return (
        f"{type(root).__name__}: {sentence} (the traceback: HYDRA_FULL_ERROR=1, or the run's traceback.txt)"
    )


def nearest(name: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'? valid: w, x, y`: the valid names, led by the one closest to `name`."""
    options = sorted(str(option) for option in valid)
    close = get_close_matches(name, options, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}valid: {', '.join(options)}"


def choices(group: str, sources: Iterable[str] = ()) -> list[str]:
    """The choices of a group of the configuration, such as `graded/dpo` of the objectives.

    `sources` are the places that Hydra takes choices from besides conf/, as it writes them: file:///DIRECTORY
    or pkg://PACKAGE.
    """
    places = [place / group for place in dict.fromkeys([CONF, *_directories(sources)])]
    files = {path: place for place in places for path in place.rglob("*.yaml")}
    names = (path.relative_to(place).with_suffix("").as_posix() for path, place in files.items())
    return list(dict.fromkeys(names))


def _directories(sources: Iterable[str]) -> Iterator[Path]:
    for scheme, _, place in (source.partition("://") for source in sources):
        if scheme == "file":
            yield Path(place)
        elif scheme == "pkg" and (spec := find_spec(place)) is not None:
            yield from map(Path, spec.submodule_search_locations or ())


def _is_ours(error: BaseException) -> bool:
    """Whether an error's message was written for the user: ours are builtin exceptions with a sentence."""
    ours = isinstance(error, USER_ERRORS) and _library(error) not in ("hydra", "omegaconf", "pydantic_core")
    # A bare key, such as KeyError('weight_map'), comes from a bug.
    return ours and not (isinstance(error, KeyError) and " " not in str(error.args[:1]))


def _library(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return _system(error)
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if _library(error) == "omegaconf":  # its further lines repeat the place in its own terms
        text = text.partition("\n")[0]
    return " ".join(text.split()) or "no message"


def _system(error: OSError) -> str:
    """The operating system's refusal, with the path."""
    if error.errno in FULL:
        where = f"could not write {error.filename}; " if error.filename else ""
        return f"the disk is full: {where}free space or set outputs= to another disk"
    if error.errno == errno.EPIPE:
        return "what this output was piped to has ended: without the pipe, the same command goes on from here"
    advice = ""
    if error.errno in UNWRITABLE:
        advice = f": {_owners_part(error.filename)}set outputs= to a writable directory"
    refused = str(error.strerror).lower()
    return f"cannot use {error.filename} ({refused}){advice}" if error.filename else f"{refused}{advice}"


def _owners_part(name: object) -> str:
    """The advice for a file that another user owns, or for a directory that takes no file."""
    path = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else Path()
    place = next((place for place in (path, *path.parents) if os.access(place, os.F_OK)), Path("/"))
    owner = place.stat().st_uid
    if os.access(place, os.W_OK) or owner in (0, os.geteuid()):
        return ""
    try:
        user = pwd.getpwuid(owner).pw_name
    except KeyError:
        user = f"user {owner}"
    return f"let {user}, who owns it, run chmod -R g+rwX {shlex.quote(str(place))}, or "


def _invalid(error: Any, key: str) -> str:
    """Every wrong value of a pydantic ValidationError: its key, the valid values and the given one."""
    valid: dict[str, list[str]] = {}
    given: dict[str, str] = {}
    for problem in error.errors():
        # A field named like a word of Python has an underscore behind it, and its key has none.
        path = [str(part).removesuffix("_") for part in problem["loc"] if not _is_type(str(part))]
        where = ".".join([key, *path]).strip(".")
        if problem["type"] in ("value_error", "assertion_error"):
            valid.setdefault(where, []).append(str(problem["ctx"]["error"]))
            continue
        message = problem["msg"].partition(", unable to")[0]
        if where in given:  # another member of a union
            message = message.removeprefix("Input should be ")
        valid.setdefault(where, []).append(message.replace("Input should", "should", 1))
        given[where] = f", got {problem['input']!r}"
    return "; ".join(
        f"{where}{'' if where in given else ':'} {' or '.join(dict.fromkeys(rules))}{given.get(where, '')}"
        for where, rules in valid.items()
    )


def _is_type(part: str) -> bool:
    """Whether a part of pydantic's location names a member of a union rather than a key."""
    return part in ("str", "int", "float", "bool") or "[" in part


def _unknown_choice(error: Any) -> str:
    if not error.missing_cfg_file:
        return _sentence(error)
    names = str(error.missing_cfg_file).split("/")
    depth = min(len(names) - 1, 2 if names[0] == "hydra" else 1)  # a choice may lie deeper: graded/dpo
    group, choice = "/".join(names[:depth]), "/".join(names[depth:])
    # Hydra lists the choices of a group, but not those of a group that takes a list.
    sources = re.findall(r"path=(\w+://\S.*)", str(error))  # the error lists Hydra's search path
    options = {*(error.options or ()), *choices(group, sources)}
    if not group or not options:
        return f"there is no configuration {error.missing_cfg_file} in {CONF}"
    return f"there is no {group}={choice}; {nearest(choice, options)}"


def _unknown_key(error: Any) -> str:
    full = str(error.full_key or error.key)
    parent = error.parent_node if error.parent_node is not None else {}
    valid = [str(name) for name in parent if name not in ("_target_", "hydra")]
    if not valid:
        return f"there is no key {full} yet: add it with a plus sign, +{full}=..."
    target = parent.get("_target_")
    more = f"; add another field of {target} with a plus sign, +{full}=..." if target else ""
    return f"there is no key {full}; {nearest(full.split('.')[-1], valid)}{more}"


def _missing(error: Any) -> str:
    return f"{error.full_key} must be given: {error.full_key}=..."


def _unreadable(error: Any) -> str:
    key, _, value = str(error.override).partition("=")
    example = f""": "{key}='{value}'\"""" if value and not set(value) & set("'\"") else ""
    return (
        f"cannot read the argument {str(error.override)!r}: write key=value, and quote values with , ="
        f" brackets or letters outside ASCII{example}"
    )


EXPLANATIONS = {
    "MissingConfigException": _unknown_choice,
    "OverrideParseException": _unreadable,
    "ConfigAttributeError": _unknown_key,
    "ConfigKeyError": _unknown_key,
    "MissingMandatoryValue": _missing,
}


def _composition(error: BaseException, root: BaseException) -> str:
    """An error of Hydra's composition, with the override or the key where Hydra names one."""
    text, cause = _sentence(error), _sentence(root)
    if text.startswith("Ambiguous value for argument "):
        argument = text.split("'")[1]
        return f"{argument} gives several values: add -m to run each of them, or write a list as key=[a,b]"
    if appended := re.match(r"Could not append to config\. An item is already at '(\S+)'", text):
        key = appended[1]
        return f"the key {key} exists already: leave out the plus sign, {key}=..."
    override = text.removeprefix("Error merging override ")
    if override != text:
        return f"cannot set {override}: {cause}"
    key = getattr(root, "full_key", None)
    return f"{key}: {cause}" if key else cause


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def replace_unprintable() -> None:
    """Print a question mark for a character that the encoding of standard output lacks, as in ASCII.

    Otherwise a run whose work is done would end in an error where it prints its table.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")

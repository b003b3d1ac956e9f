"""The choices of every group and the keys of each, with the meanings that their YAML files give."""

import argparse
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from runners.errors import CONF

NO_CHOICE = "override hydra/job_logging"  # the format of the log, of which there is one


def defaults() -> dict[str, list[str]]:
    """Every group with the choices that config.yaml makes, in its order."""
    entries = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    groups = [
        (key.removeprefix("override "), value)
        for entry in entries
        if isinstance(entry, dict)
        for key, value in entry.items()
        if key != NO_CHOICE and not key.startswith("optional ")
    ]
    return {group: value if isinstance(value, list) else [value] if value else [] for group, value in groups}


def listing(group: str) -> str:
    """The choices of a group, one a line, each with its meaning."""
    files = _files(group)
    width = max(map(len, files))
    return "\n".join(f"{name:{width}}  {meaning(path)}".rstrip() for name, path in files.items())


def meaning(path: Path) -> str:
    """The first comment of a choice's file: one sentence."""
    comments = (line[2:] for line in path.read_text().splitlines() if line.startswith("# "))
    return next((comment for comment in comments if not comment.startswith("@package")), "")


def reference(arguments: Sequence[str] = ()) -> str:
    """Every group with its choices, and the keys of those that a command line chooses and their meanings."""
    own = _config_directories(arguments)
    files = {group: _files(group, own) for group in defaults()}
    chosen = _chosen(arguments)
    keys = [
        f"{group}={name}: {meaning(files[group][name])}\n{_indented(_keys(files[group][name]))}"
        for group, names in chosen.items()
        for name in names
        if name in files[group]
    ]
    return "\n".join(
        [
            "Groups, chosen by GROUP=CHOICE, or several by 'probe=[CHOICE,CHOICE]'; * is chosen here:",
            *_groups(files, chosen),
            "",
            "Keys of a run, set by KEY=VALUE:",
            _indented(_keys_of_all(list(files))),
            "",
            "Keys of the chosen parts, set by GROUP.KEY=VALUE, such as training.steps=128; those of probes",
            "and interventions by GROUP.CHOICE.KEY=VALUE, such as probe.rsf.k=16.",
            "Those of another choice: weightgeom run GROUP=CHOICE --help",
            "",
            "\n\n".join(keys),
        ]
    )


def _files(group: str, own: Sequence[Path] = ()) -> dict[str, Path]:
    """The files of a group's choices by name, such as `graded/dpo`; ours go before those of `own`."""
    files = {
        path.relative_to(place / group).with_suffix("").as_posix(): path
        for place in [*own, CONF]
        for path in (place / group).rglob("*.yaml")
    }
    return dict(sorted(files.items()))


def _config_directories(arguments: Sequence[str]) -> list[Path]:
    """The user's own choices: the value of Hydra's flag `--config-dir`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    directory = parser.parse_known_args(arguments)[0].config_dir
    return [] if directory is None else [directory]


def _chosen(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Every group with the choices that a command line makes, or else those of config.yaml."""
    chosen = defaults()
    for argument in arguments:
        group, equals, value = argument.lstrip("+").partition("=")
        if equals and group in chosen:
            chosen[group] = value.strip("[]").replace(" ", "").split(",")
    return chosen


def _groups(files: Mapping[str, Mapping[str, Path]], chosen: Mapping[str, Sequence[str]]) -> list[str]:
    room = max(map(len, files)) + 4
    return [
        textwrap.fill(
            " ".join(f"{name}*" if name in chosen[group] else name for name in names),
            shutil.get_terminal_size().columns,
            initial_indent=f"  {group}".ljust(room),
            subsequent_indent=" " * room,
            break_on_hyphens=False,
        )
        for group, names in files.items()
    ]


def _keys(path: Path) -> str:
    """The keys of a choice as its file writes them, without the target and the comments above it."""
    lines = path.read_text().splitlines()
    while lines and (lines[0].startswith("#") or not lines[0]):
        del lines[0]
    if lines and lines[0] == f"{path.stem}:":  # a probe or an intervention, under its own name
        lines = textwrap.dedent("\n".join(lines[1:])).splitlines()
    return "\n".join(line for line in lines if not line.startswith("_target_"))


def _keys_of_all(groups: Sequence[str]) -> str:
    """The keys of config.yaml itself, without those that the groups fill and those of Hydra."""
    _, _, keys = (CONF / "config.yaml").read_text().partition("\n\n")
    own, _, _ = keys.partition("\nhydra:")
    return "\n".join(line for line in own.strip().splitlines() if line.partition(":")[0] not in groups)


def _indented(text: str) -> str:
    return textwrap.indent(text, "  ")

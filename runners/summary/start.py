"""The first lines of a run: its parts by name, before anything heavy is imported."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runners.summary.durations import duration
from runners.tracking.redaction import redacted_text

if TYPE_CHECKING:
    from weightgeom.text.examples import Examples

log = logging.getLogger(__name__)
GENERATED = "weightgeom.data.world.World"
OWN_TEXT = "the text is the generated world, not yours: give data=text data.train=FILE"
LOADING = "loading torch and transformers, and checking all parts ..."


def announce(run: Mapping[str, Any]) -> None:
    """Print the parts of a run from `described`, and warn of a generated text under a foreign model."""
    from rich import get_console

    console = get_console()
    console.on_broken_pipe = _nobody_reads
    console.print(banner(run))
    if foreign(run):
        log.warning(OWN_TEXT)
    console.print(LOADING, style="dim", highlight=False)


def _nobody_reads() -> None:
    """Let the BrokenPipeError pass that rich handles: it would end the process without a word."""
    raise


def banner(run: Mapping[str, Any]) -> object:
    """The parts of a run, a line each."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for head, text in _parts(run):
        grid.add_row(head, Text(redacted_text(text)))  # not as markup: brackets stay
    return grid


def foreign(run: Mapping[str, Any]) -> bool:
    """Whether the text is the generated world, and the model is neither made here nor by an earlier run."""
    outputs = Path(run["outputs"])
    if _part(run, "data").get("_target_") != GENERATED:
        return False
    places = [text for key, text in _texts(_part(run, "model")) if _names_weights(key)]
    return any(outputs not in Path(place).expanduser().resolve().parents for place in places)


def say(lines: Iterable[str]) -> None:
    """Print lines, broken between words in a terminal and whole elsewhere."""
    from rich import get_console

    console = get_console()
    for line in lines:
        whole = not console.is_terminal
        console.print(redacted_text(line), soft_wrap=whole, markup=False, highlight=False)


def data_line(examples: "Examples") -> str:
    """Such as `data: world-style, 20,000 documents and 96 held out, 2,000 pairs and 96 held out`."""
    parts = (
        ("documents", examples.text, examples.heldout),
        ("pairs", examples.pairs, examples.heldout_pairs),
    )
    counts = (
        f"{len(train):,} {kind} and {len(held):,} held out" for kind, train, held in parts if train or held
    )
    return f"data: {', '.join([examples.name, *counts])}"


def foreseen_lines(made: list[str], unmade: list[str], seconds: float, untimed: list[str]) -> Iterator[str]:
    """The stages that are reused and those that are made, with an estimate of the time for these.

    `untimed` are the stages to be made that nothing is known of.
    """
    if made:
        yield f"reused: {', '.join(made)}"
    if not unmade:
        yield "to make: nothing, all stages are here already"
        return
    yield f"to make: {', '.join(unmade)}"
    yield f"time: {estimate(seconds, untimed, len(unmade))}"


def estimate(seconds: float, untimed: list[str], stages: int) -> str:
    """Such as `about 3 min, without rsf, which has never been timed here`."""
    if len(untimed) == stages:
        return "no estimate yet, as no stage like these was made here before"
    without = f", without {', '.join(untimed)}: not timed here before" if untimed else ""
    return f"about {duration(seconds)}, by earlier stages like these{without}"


def _parts(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    config, params = run["config"], run["params"]
    yield "run", f"{config['name']}: {run['run_name']}"
    for key in ("model", "data", "objective"):
        named = ", ".join(f"{name}={text}" for name, text in _texts(_part(run, key)))
        yield key, f"{params[key]} ({named})" if named else str(params[key])
    training = _part(run, "training")
    if _part(run, "objective").get("_target_"):
        steps = f"{training.get('steps')} steps of {training.get('batch_size')}"
        yield "training", f"{params['training']}, {steps}"
    for key in ("probe", "intervention"):
        if names := [name for name, choice in config[key].items() if isinstance(choice, Mapping)]:
            yield f"{key}s", ", ".join(names)
    device = config.get("device")
    yield "device", "auto: the GPU if there is one, else the CPU" if device == "auto" else str(device)
    yield "outputs", run["outputs"]


def _part(run: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of the configuration, which nothing has checked yet."""
    part = run["config"].get(key)
    return part if isinstance(part, Mapping) else {}


def _texts(part: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The values of a part of the configuration that are names or paths."""
    for key, value in part.items():
        if isinstance(value, Mapping) and key == "stages":
            yield from ((f"{key}.{name}", str(text)) for name, text in value.items())
        elif isinstance(value, str) and value and key != "_target_":
            yield key, value
        elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            yield key, " ".join(value)


def _names_weights(key: str) -> bool:
    return key in ("name", "before", "after") or key.startswith("stages.")

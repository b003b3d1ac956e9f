"""Overrides that make a stage smaller, in the form of the command line."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from weightgeom.training.config import Training

DIVISORS = (2, 3, 4, 6, 8, 12, 16, 24, 32)


def smaller_trainings(
    key: str, training: Training, from_random: bool, config: Mapping[str, Any]
) -> Iterator[tuple[str, Training]]:
    """Trainings with less memory, ordered by how little they differ, each with its overrides."""
    assignment = partial(override, config=config)
    for divisor in DIVISORS:
        size, rest = divmod(training.batch_size, divisor)
        if size and not rest and size % training.processes == 0:
            steps = training.accumulate * divisor
            overrides = f"{assignment(f'{key}.batch_size', size)} {assignment(f'{key}.accumulate', steps)}"
            yield overrides, replace(training, batch_size=size, accumulate=steps)
    whole = training.log_gradients or training.orthogonal or training.shard  # not with an adapter
    if not from_random and training.lora.r is None and not whole:
        yield assignment(f"{key}.lora.r", 16), replace(training, lora=replace(training.lora, r=16))
    for length in (training.max_length // 2, training.max_length // 4):
        yield assignment(f"{key}.max_length", length), replace(training, max_length=length)


def override(key: str, value: object, config: Mapping[str, Any]) -> str:
    """An override in the form of the command line: with a plus sign if the configuration lacks the key."""
    tree: Any = config
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return f"+{key}={value:g}" if isinstance(value, float) else f"+{key}={value}"
        tree = tree[part]
    return f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"

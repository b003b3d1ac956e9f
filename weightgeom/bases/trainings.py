"""Alignment of several trainings that start from one base: other objectives, data or seeds."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightgeom.bases.sources import Source, check_apart, plain_config, source_of
from weightgeom.estimators.alignment import ENERGY, NULLS, Aligned, aligned, leading, pooled
from weightgeom.geometry.nulls import relabelled
from weightgeom.models.adapters import warn_of_other_base
from weightgeom.models.residual import Architecture, architecture_of
from weightgeom.models.weights import check_finite, difference
from weightgeom.params import Params
from weightgeom.table import Row, row, tabulate

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from transformers import PreTrainedConfig, PreTrainedModel

    Checkpoint = str | Path | PreTrainedModel | Mapping[str, torch.Tensor | np.ndarray]

Pair = tuple[str, str]


def alignments(
    before: "Checkpoint",
    trainings: "Mapping[str, Sequence[Checkpoint]]",
    *,
    energy: float = ENERGY,
    config: "PreTrainedConfig | None" = None,
) -> "pd.DataFrame":
    """Align the updates of several trainings of one base, pair by pair, as a tidy table.

    `trainings` has the ends of each training by its name, one for each seed. Checkpoints and `config` are as
    in `weightgeom.measure`. The column `treatment` is the first update A and `against` the second, B, by the
    name of the training, with the number of the seed where it has several: `dpo.0`. Rows without a matrix are
    over all matrices of the residual stream.

    Quantities: those of `weightgeom.estimators.alignment.pooled`, with their nulls under random rotations:
    cosine, orthogonal_share, alignment_ratio, mode_overlap. Of every training and matrix, delta_norm and
    participation_ratio, 1 / Σp² with p the shares of the squared singular values of its update. Where two
    trainings have two or more seeds each, of the cosine, the alignment ratio (in both orders) and the mode
    overlap over all matrices, between their names:
        between_<quantity>_mean: over the pairs of a seed of one and a seed of the other.
        within_<quantity>_mean, within_<quantity>_sd: over the pairs of seeds of the same training.
        within_<quantity>_p_value: of a within mean that exceeds the between mean as much, over all divisions
            of the seeds among the two trainings (`weightgeom.geometry.nulls.relabelled`).

    Examples:
        >>> table = alignments("base", {"dpo": ["dpo-0", "dpo-1"], "ce": ["ce-0", "ce-1"]})
        >>> whole = table[(table["quantity"] == "cosine") & (table["matrix"] == "")]
        >>> whole.pivot(index="treatment", columns="against", values="value")

    Raises:
        FileNotFoundError: if a directory or its weights are missing.
        TypeError: if the ends of a training are not a list.
        ValueError: if there are fewer than two ends, if one differs from `before` in a name or a shape or
            is not finite, or if nothing moved in one of them.
    """
    ends = _ends(trainings)
    sources = {name: source_of(given, name) for name, given in ends.items()}
    start = source_of(before, "before")
    if start.is_adapter:
        raise ValueError(f"before={before} is an adapter: give its base model there instead")
    architecture = _architecture([start, *sources.values()], config)
    base = start.params(architecture)
    weights = {name: end_weights(source, before, base, architecture) for name, source in sources.items()}
    whole: dict[Pair, list[Aligned]] = {}
    rows: list[Row] = []
    moved: set[str] = set()
    for matrix in architecture.matrices:
        old = matrix.written(base).float().cpu()
        updates = {
            name: part
            for name, params in weights.items()
            if (part := leading(matrix.written(params).float().cpu() - old, energy)) is not None
        }
        moved |= updates.keys()
        for name, part in updates.items():
            place = {"treatment": name, "n": part.update.numel(), **matrix.table_columns}
            rows.append(row("delta_norm", part.energy**0.5, **place))
            rows.append(row("participation_ratio", 1 / part.concentration, **place))
        for pair in permutations(updates, 2):
            alignment = aligned(updates[pair[0]], updates[pair[1]])
            whole.setdefault(pair, []).append(alignment)
            rows += _pair(pair, [alignment], list(ends), **matrix.table_columns)
    if unmoved := [name for name in ends if name not in moved]:
        raise ValueError(f"no matrix of {unmoved[0]} has moved from before: give the end of its training")
    for pair, parts in whole.items():
        rows += _pair(pair, parts, list(ends))
    rows += _over_seeds({name: len(given) for name, given in trainings.items()}, whole)
    return tabulate([{"step": 1, **row} for row in rows])


def _ends(trainings: "Mapping[str, Sequence[Checkpoint]]") -> dict[str, Any]:
    ends: dict[str, Any] = {}
    for name, given in trainings.items():
        if isinstance(given, str | Path | Mapping) or not isinstance(given, Sequence):
            raise TypeError(f"the ends of {name} must be a list, one for each seed: write {name!r}: [DIR]")
        ends |= {name_of(name, seed, len(given)): end for seed, end in enumerate(given)}
    if len(ends) < 2:
        raise ValueError(f"two or more trainings have an alignment, got {len(ends)}: add another one")
    return ends


def name_of(training: str, seed: int, seeds: int) -> str:
    """The name of one training: `dpo`, or `dpo.0` where it has several seeds."""
    return training if seeds == 1 else f"{training}.{seed}"


def _architecture(sources: Sequence[Source], config: "PreTrainedConfig | None") -> Architecture:
    given = None if config is None else plain_config(config)
    known = [
        config
        for config in (sources[0].config, given, *(source.config for source in sources))
        if config is not None
    ]
    if not known:
        raise ValueError(
            "a state dict says nothing of its network: add config=network.config, or"
            " config=AutoConfig.from_pretrained(NAME)"
        )
    return architecture_of(known[0])


def end_weights(source: Source, before: object, base: Params, architecture: Architecture) -> Params:
    """The weights of a training's end, whole or an adapter of `base`; `before` is the base as it was given.

    Raises:
        ValueError: if they differ from the base in a name or a shape, are the same tensors, or not finite.
    """
    params = source.params(architecture, base)
    if source.is_adapter:
        if source.directory is not None and isinstance(before, str | Path):
            warn_of_other_base(source.directory, str(before))
    else:  # an adapter fits, and would be multiplied out
        difference(params, base, architecture)
    check_apart(base, params)
    check_finite(params, architecture, str(source.directory or source.label))
    return params


def _pair(pair: Pair, parts: Sequence[Aligned], names: Sequence[str], **place: Any) -> Iterator[Row]:
    """The rows of two updates; those that do not depend on their order once."""
    treatment, against = pair
    n = sum(part.entries for part in parts)
    for name, value in pooled(parts).items():
        if names.index(against) < names.index(treatment) or "alignment_ratio" in name:
            yield row(name, value, n=n, treatment=treatment, against=against, **place)


def _over_seeds(seeds: Mapping[str, int], whole: Mapping[Pair, Sequence[Aligned]]) -> Iterator[Row]:
    values = {pair: pooled(parts) for pair, parts in whole.items()}
    for against, treatment in combinations([name for name, count in seeds.items() if count > 1], 2):
        names = [
            name_of(name, seed, seeds[name]) for name in (against, treatment) for seed in range(seeds[name])
        ]
        for quantity in NULLS:
            similarity = torch.eye(len(names), dtype=torch.float64)
            for (row_place, first), (place, second) in permutations(enumerate(names), 2):
                both = [values[pair][quantity] for pair in ((first, second), (second, first))]
                similarity[row_place, place] = sum(both) / 2
            groups = relabelled(similarity, seeds[against])
            about: dict[str, Any] = {"treatment": treatment, "against": against}
            yield row(f"between_{quantity}_mean", groups.between, n=groups.pairs_between, **about)
            yield row(f"within_{quantity}_mean", groups.within, n=groups.pairs_within, **about)
            yield row(f"within_{quantity}_sd", groups.within_sd, n=groups.pairs_within, **about)
            yield row(f"within_{quantity}_p_value", groups.p_value, n=groups.divisions, **about)

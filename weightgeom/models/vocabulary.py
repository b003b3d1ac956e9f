"""A checkpoint over the vocabulary of another: embeddings that were resized, tied or untied in between."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.models.json_files import json_object
from weightgeom.models.residual import Architecture
from weightgeom.models.weights import shape_of
from weightgeom.params import Params

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Aligned(Mapping[str, Tensor]):
    """`params` with the parameters of `base`, each taken from `sources`, read when it is asked for.

    Of an embedding or unembedding with other rows than the base's, the rows that both have are its own;
    those that only the base has are the base's, as if they had not moved.
    """

    params: Params
    base: Params
    sources: Mapping[str, str]  # name: the parameter that stands for it
    vocabulary: tuple[str, ...]

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        own = self.params[self.sources[name]]
        if name not in self.vocabulary:
            return own
        base = self.base[name]
        return own[: len(base)] if len(own) >= len(base) else torch.cat([own, base[len(own) :]])

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    def __contains__(self, name: object) -> bool:
        return name in self.sources


def aligned(params: Params, base: Params, architecture: Architecture, directory: Path) -> Params:
    """The parameters of the checkpoint in `directory`, those of the vocabulary with the base's shape.

    The number of shared rows is logged. `params` itself is given back where nothing differs.

    Raises:
        ValueError: if the base unembeds with its embedding and the checkpoint has another unembedding.
    """
    embed, unembed = architecture.embed, architecture.unembed
    sources = {name: name for name in params}
    if unembed in base and unembed not in params and embed in params and _tied(directory):
        sources[unembed] = embed
    if unembed in params and unembed not in base and architecture.tied:
        if not torch.equal(params[unembed], params[embed]):
            raise ValueError(
                f"{directory} has an unembedding of its own and its base unembeds with the embedding:"
                " no one network has both, so give a base that does not tie them"
            )
        del sources[unembed]
    resized = []
    for name in (embed, unembed):
        if name in sources and name in base:
            new, old = shape_of(params, sources[name]) or (0,), shape_of(base, name) or (0,)
            if new[0] != old[0] and new[1:] == old[1:]:
                resized.append(name)
                note_rows(str(directory), name, new[0], old[0])
    changed = resized or sources.keys() != params.keys()
    return Aligned(params, base, sources, tuple(resized)) if changed else params


def _tied(directory: Path) -> bool:
    # Weights in memory have no config, but an unembedding even where it is tied.
    config = directory / "config.json"
    return config.is_file() and json_object(config).get("tie_word_embeddings") is True


@cache  # once for each checkpoint
def note_rows(directory: str, name: str, new: int, old: int) -> None:
    """Say once in the log that an embedding has other rows than the base's."""
    rest = f"; the {old - new} that it lacks are taken as unmoved" if new < old else ""
    log.warning(
        "%s has %d rows of %s and its base %d: the %d shared ones are compared%s",
        *(directory, new, name, old, min(new, old), rest),
    )

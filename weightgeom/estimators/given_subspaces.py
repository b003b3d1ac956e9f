"""Subspaces of the residual stream that a user gives: directions in a file, or the contrast of two groups."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import BeforeValidator
from torch import Tensor

from weightgeom.estimators.alignment import overlap
from weightgeom.estimators.hidden_states import last_inputs, last_states
from weightgeom.geometry.contrast_subspace import ContrastSubspace
from weightgeom.geometry.subspace import Subspace
from weightgeom.interfaces import Setting
from weightgeom.models.residual import Architecture, ResidualMatrix
from weightgeom.table import OWN_SUBSPACES, Row, row
from weightgeom.text.examples import Examples
from weightgeom.text.files import sha256
from weightgeom.text.prompt_groups import equal_groups, read_prompts

log = logging.getLogger(__name__)


def _by_name(frames: object) -> object:
    """A list of subspaces by names of their own; the two that `rsf` has in any case are passed over."""
    if not isinstance(frames, list | tuple):
        return {} if frames is None else frames
    named: dict[str, object] = {}
    for source in (
        source for source in frames if source not in ("attention_input", "mlp_input", "prediction")
    ):
        parts = [source] if isinstance(source, str) else source
        stems = [Path(part).stem if isinstance(part, str) else str(part) for part in parts]
        name = "_against_".join(re.sub(r"[^\w-]+", "_", stem) for stem in stems)
        if name in named:
            raise ValueError(
                f"two subspaces would be named {name}: give names, as in {{{name}: {source}, ...}}"
            )
        named[name] = source
    return named


Frames = Annotated[dict[str, str | list[str]], BeforeValidator(_by_name)]
"""Subspaces by name: a safetensors file of directions, or two groups of prompts, `[A, B]`.

A group is one of the data's own (`data.groups`) by its name, or a file of prompts. A list of them takes their
names from the files or groups.
"""
PROMPTS = 128  # of each group at most
LEAST = 8
PERMUTATIONS = 39  # of the labels: the smallest p-value is 1/40
EVERYWHERE = ""  # the place of directions that serve all matrices
RESIDUAL = "residual"  # the stream behind a layer, where matrices that write are compared
NAME, PLACE = re.compile(r"[A-Za-z][\w-]*"), re.compile(r"L\d+(\..+)?")


@dataclass(frozen=True, eq=False)
class GivenSubspace:
    """One given subspace at every place that has one; matrices at a place share it."""

    name: str
    spaces: Mapping[str, Subspace]
    contrasts: Mapping[str, ContrastSubspace] = field(default_factory=dict)

    def place(self, matrix: ResidualMatrix) -> str | None:
        """The place whose subspace serves the matrix; None without any."""
        return next((place for place in places_of(matrix) if place in self.spaces), None)

    def at(self, matrix: ResidualMatrix) -> Subspace | None:
        """The subspace that the matrix's residual side is compared with."""
        place = self.place(matrix)
        return None if place is None else self.spaces[place]

    def contrast(self, matrix: ResidualMatrix) -> ContrastSubspace | None:
        """The two groups' states behind the subspace; None of a file."""
        place = self.place(matrix)
        return None if place is None else self.contrasts.get(place)

    def dimensions(self, matrix: ResidualMatrix, wanted: Sequence[int]) -> Sequence[int]:
        """The dimensions to compare at: those wanted of a contrast, all directions at once of a file."""
        space = self.at(matrix)
        return wanted if self.contrasts or space is None else [space.basis.shape[1]]


def places_of(matrix: ResidualMatrix) -> tuple[str, ...]:
    """The places that may serve a matrix, the most specific first: L3.q, L3.attention_input, L3, all."""
    site = matrix.site if matrix.role == "read" else RESIDUAL
    return matrix.name, f"L{matrix.layer}.{site}", f"L{matrix.layer}", EVERYWHERE


def given_subspaces(frames: Frames | None, setting: Setting, k: int) -> list[GivenSubspace]:
    """The given subspaces, contrasts with their first k directions at the trajectory's start.

    A start of random weights has no representations, so a pretraining takes those of its end.
    """
    given = []
    for name, source in (frames or {}).items():
        if isinstance(source, str):
            spaces = {place: Subspace(basis) for place, basis in directions_in(source).items()}
            given.append(GivenSubspace(name, spaces))
        else:
            given.append(_contrasted(name, source, setting, k))
        bare = [matrix.name for matrix in setting.model.architecture.matrices if given[-1].at(matrix) is None]
        if bare:
            log.info("%s has no directions for %d matrices, the first %s", name, len(bare), bare[0])
    return given


def frame_dimensions(source: str | Sequence[str], wanted: Sequence[int]) -> Sequence[int]:
    """The dimensions at which a frame is compared: those wanted of a contrast, all directions of a file."""
    if not isinstance(source, str):
        return wanted
    return [max(basis.shape[1] for basis in directions_in(source).values())]


def _contrasted(name: str, groups: Sequence[str], setting: Setting, k: int) -> GivenSubspace:
    """The contrast of two groups at the last token of their prompts: at the inputs, and behind the layers."""
    model, architecture = setting.model, setting.model.architecture
    params = setting.end if setting.from_random else setting.start
    prompts = equal_groups(prompts_of(groups, setting.examples, name), PROMPTS, setting.seed)
    network = model.with_weights(params).requires_grad_(False).eval()
    layers = range(architecture.n_layers)
    states: list[dict[str, Tensor]] = []
    for group in prompts.values():
        inputs = last_inputs(model, network, group, architecture.sites)
        behind = last_states(model, network, group, layers)
        states.append(
            {f"L{site.layer}.{site.name}": state for site, state in inputs.items()}
            | {f"L{layer}.{RESIDUAL}": state for layer, state in behind.items()}
        )
    first, second = states
    contrasts = {
        place: ContrastSubspace.of(first[place], second[place], PERMUTATIONS, setting.seed) for place in first
    }
    spaces = {place: contrast.space(k) for place, contrast in contrasts.items()}
    return GivenSubspace(
        name, {place: space for place, space in spaces.items() if space is not None}, contrasts
    )


def check_frames(frames: Frames | None, architecture: Architecture, key: str) -> None:
    """Raise ValueError for a name that is taken, or a file whose directions do not fit the model."""
    valid = {place for matrix in architecture.matrices for place in places_of(matrix)}
    for name, source in (frames or {}).items():
        if not NAME.fullmatch(name) or name in OWN_SUBSPACES:
            raise ValueError(
                f"{key} has the name {name!r}: give letters, digits, _ and -, and none of"
                f" {', '.join(sorted(OWN_SUBSPACES - {''}))}"
            )
        if not isinstance(source, str):
            if len(source) != 2 or source[0] == source[1]:
                raise ValueError(
                    f"{key}.{name} must be a safetensors file, or two different groups of prompts, as in"
                    f" {key}.{name}=[harmful.jsonl,harmless.jsonl], got {source}"
                )
            continue
        for place, basis in directions_in(source).items():
            if place not in valid:
                raise ValueError(
                    f"{source} has directions for {place}, which the model does not have: name tensors as in"
                    f" {', '.join(places_of(architecture.matrices[0])[:3])}, or give a single tensor for all"
                )
            if len(basis) != architecture.d_model:
                raise ValueError(
                    f"the directions in {source} have the shape {tuple(basis.shape)}, and the residual stream"
                    f" is {architecture.d_model} wide: a tensor must have {architecture.d_model} rows, one"
                    " direction a column"
                )


def check_frame_prompts(frames: Frames | None, examples: Examples, key: str) -> None:
    """Raise ValueError for groups of prompts that are missing, too small, or not apart."""
    for name, source in (frames or {}).items():
        if not isinstance(source, str):
            prompts_of(source, examples, f"{key}.{name}")


def prompts_of(groups: Sequence[str], examples: Examples, what: str) -> dict[str, list[str]]:
    """The prompts of two groups, each a group of the data by its name, or a file.

    Raises:
        ValueError: if a group is neither, has fewer than 8 prompts, or shares one with the other.
    """
    prompts: dict[str, list[str]] = {}
    for group in groups:
        if group in examples.groups:
            prompts[group] = list(dict.fromkeys(question.prompt for question in examples.groups[group]))
            continue
        try:
            prompts[group] = read_prompts(group)
        except FileNotFoundError as error:
            there = ", ".join(examples.groups) or "none: set data.groups"
            raise ValueError(
                f"{what}: {group!r} is no file, and no group of the data (these are {there}): {error}"
            ) from error
    (first, second) = prompts.values()
    if shared := set(first) & set(second):
        raise ValueError(f"{what}: both groups have the prompt {min(shared)!r}: keep it in one of them")
    if min(len(first), len(second)) < LEAST:
        sizes = " and ".join(f"{group} {len(members)}" for group, members in prompts.items())
        raise ValueError(
            f"{what}: the groups have too few prompts ({sizes}): give {LEAST} or more of each, in a field"
            " `prompt` of records, or as plain text with blank lines between them"
        )
    return prompts


def directions_in(name: str) -> Mapping[str, Float[Tensor, "d k"]]:
    """Orthonormal directions by place from a safetensors file of tensors d x k, or of one vector each.

    A single tensor serves all matrices, unless its name is a place. Directions that are not orthonormal are
    replaced by an orthonormal basis of their span, which the log says.

    Raises:
        ValueError: if the file cannot be read, or directions are not finite or linearly dependent.
    """
    path = Path(name).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(
            f"no safetensors file {name!r}: give one with directions d x k, or two groups of prompts in"
            " brackets"
        )
    return _directions_in(path, sha256(path))


@lru_cache(maxsize=8)
def _directions_in(path: Path, content: str) -> Mapping[str, Float[Tensor, "d k"]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the directions in {path} cannot be read: {error}") from error
    if not tensors:
        raise ValueError(f"{path} holds no tensor: give directions d x k")
    single = len(tensors) == 1 and not PLACE.fullmatch(next(iter(tensors)))
    return {
        EVERYWHERE if single else place: _orthonormal(tensor.double(), f"{place} in {path}")
        for place, tensor in tensors.items()
    }


def _orthonormal(directions: Tensor, what: str) -> Float[Tensor, "d k"]:
    basis = directions[:, None] if directions.ndim == 1 else directions
    if basis.ndim != 2 or not 1 <= basis.shape[1] <= len(basis):
        raise ValueError(
            f"the directions {what} have the shape {tuple(directions.shape)}: give d x k, one direction a"
            " column"
        )
    if not bool(basis.isfinite().all()):
        raise ValueError(f"the directions {what} are not finite")
    q, values, _ = torch.linalg.svd(basis, full_matrices=False)
    if (rank := int((values > 1e-6 * values[0]).sum())) < len(values):
        raise ValueError(
            f"the directions {what} are linearly dependent, of rank {rank} of {len(values)}: leave out those"
            " that the others span"
        )
    if float((basis.T @ basis - torch.eye(len(values), dtype=basis.dtype)).abs().max()) < 1e-3:
        return torch.linalg.qr(basis).Q  # they are, but for the rounding of their file
    log.info(
        "the %d directions %s are not orthonormal: an orthonormal basis of their span is taken",
        len(values),
        what,
    )
    return q


def permuted_rows(
    contrast: ContrastSubspace, gram: Float[Tensor, "d d"], k: int, place: Mapping[str, Any]
) -> Iterator[Row]:
    """The ratio of an update for groups with shuffled labels, and p against them, one-sided."""
    ratios = contrast.ratios(gram, k)
    shuffled, n = ratios[1:], len(ratios) - 1
    p = (1 + int((shuffled >= ratios[0]).sum())) / (1 + n)
    yield row("permuted_frame_ratio_mean", float(shuffled.mean()), n=n, k=k, **place)
    yield row("permuted_frame_ratio_sd", float(shuffled.std()), n=n, k=k, **place)
    yield row("permuted_frame_p_value", p, n=n, k=k, **place)


def group_rows(contrast: ContrastSubspace, **place: Any) -> Iterator[Row]:
    """The overlap of the two groups' leading directions, with its levels by chance and of shuffled groups."""
    overlaps, sizes = contrast.group_overlaps
    shuffled, n = overlaps[1:], len(overlaps) - 1
    p = (1 + int((shuffled <= overlaps[0]).sum())) / (1 + n)
    yield row("group_overlap", float(overlaps[0]), n=len(contrast.states), **place)
    yield row("null_group_overlap_mean", max(sizes) / len(contrast.span), n=n, **place)
    yield row("permuted_group_overlap_mean", float(shuffled.mean()), n=n, **place)
    yield row("permuted_group_overlap_sd", float(shuffled.std()), n=n, **place)
    yield row("group_overlap_p_value", p, n=n, **place)


def overlap_rows(spaces: Mapping[str, Subspace], **place: Any) -> Iterator[Row]:
    """The overlap of every two subspaces, with its mean and spread if either is random, in closed form."""
    for (name, space), (other_name, other_space) in combinations(spaces.items(), 2):
        value, mean, sd = overlap(space.basis.double(), other_space.basis.double())
        size = min(space.basis.shape[1], other_space.basis.shape[1])
        at = place | {"subspace": f"{name}:{other_name}", "k": size, "n": size}
        yield row("frame_overlap", value, **at)
        yield row("null_frame_overlap_mean", mean, **at)
        yield row("null_frame_overlap_sd", sd, **at)

"""Relative subspace fraction: the share of an update in the subspaces of inputs and predictions."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.bases.outline import Shape
from weightgeom.compat.torch_internals import trim_memory
from weightgeom.declarations import ASYMMETRY, ProbeDeclaration
from weightgeom.estimators.embeddings import embeddings_moved, other_rows, places_needed, unembedding_moves
from weightgeom.estimators.given_subspaces import (
    Frames,
    GivenSubspace,
    check_frame_prompts,
    check_frames,
    given_subspaces,
    group_rows,
    overlap_rows,
    permuted_rows,
)
from weightgeom.estimators.gradients import Gathering, gradient_moments
from weightgeom.estimators.kept_frames import keep_frames, kept_frames
from weightgeom.estimators.moments import GIB, SUMS, Moment, Settled, groups_size, packs
from weightgeom.estimators.pathways import Pathways
from weightgeom.estimators.products import check_products, product_places, product_rows
from weightgeom.estimators.reference_subspaces import (
    PREDICTION,
    Frame,
    Inputs,
    Place,
    check_dimensions,
    dimensions,
    in_walk,
    input_frames,
    most_tokens,
    place_of,
    prediction_frame,
    random_frame,
)
from weightgeom.estimators.updates import Update, head_updates, update_of, warn_of_rounding
from weightgeom.geometry.bootstrap import bootstrap_interval, widening
from weightgeom.geometry.gram import EXACT
from weightgeom.geometry.nulls import (
    Estimated,
    adapter_moment,
    isotropic_null,
    matched_null,
    moment_root,
    rotation_null,
    spectrum_shares,
)
from weightgeom.geometry.subspace import Subspace
from weightgeom.interfaces import Setting
from weightgeom.models.adapters import Adapted
from weightgeom.models.residual import Architecture, ResidualMatrix
from weightgeom.params import Params
from weightgeom.table import Row, own, row
from weightgeom.text.examples import Examples

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TESTED = ("p_value", "matched_p_value", "trained_matched_p_value", "frame_p_value", "permuted_frame_p_value")
BATCH_PROMPTS = 2  # of a backward pass, which keeps their activations


@dataclass(frozen=True)
class RSF:
    """Share of every update dW inside a subspace, over its level k/d under chance.

    Read matrices (q k v gate up) are compared on their input side with the top-k principal
    directions of their inputs, write matrices (o down) on their output side with the top-k right
    singular vectors of the unembedding, and all with a random subspace too. Source: arXiv:2605.16600,
    one side at a time; its sum of two sides arises for `products` alone, as no matrix of these reads and
    writes. The reads of an expert are compared with the inputs of the tokens that the router sends to it, at
    whichever checkpoint `at` says; an expert that gets no held-out token has no rows but those of its size.

    Quantities:
        fraction: ‖dW U‖²_F / ‖dW‖²_F (read) or ‖Uᵀ dW‖²_F / ‖dW‖²_F (write), in [0, 1].
        ratio: fraction / (k/d), in [0, d/k]; 1 is isotropic. Where U is estimated from text, fraction
            and ratio have the bootstrap's standard error over prompts.
        ratio_low, ratio_high: ends of the ratio's 95 % interval over prompts (`bootstrap_interval`).
        null_ratio_mean, null_ratio_sd: of the ratio under `null_kind`.
        z, p_value, q_value: of the fraction under `null_kind`, one-sided: is dW more concentrated than
            chance? p has its Monte Carlo standard error where it is sampled; q is Benjamini and
            Hochberg's, over the layers and matrices that have the same k; heads and experts are families of
            their own.
        matched_ratio: the ratio expected if the inputs were independent of the upstream gradients: from the
            inputs on the read side, from the objective's upstream gradients at the start on the write side.
            Left out where moments are centred, as the identity needs E[a aᵀ], and on the write side where the
            objective is not known. matched_ratio_low, matched_ratio_high.
        crossfit_ratio, crossfit_matched_ratio: the ratio, and its matched level, with the subspaces of one
            half of the prompts and the level of the other, both ways: a subspace explains more of the text
            that it was estimated from than of other text. On the read side.
        matched_z, matched_p_value, matched_q_value: of the fraction against that level; on the read side of
            the cross-fitted fraction against the cross-fitted level. They allow for the level's own error.
        trained_matched_ratio: of reads, the matched level of the inputs on training examples at the start, at
            the positions whose next token the objective scores; trained_matched_ratio_low, ..._high. No
            cross-fitting, as the subspace is that of other text. Where the objective is known, for whole
            matrices, in models without experts.
        trained_matched_z, trained_matched_p_value, trained_matched_q_value: of the fraction against it.
        adapter_rank: the rank r of an adapter's factor A, where the update is one that reads. Its matched
            level is then that of Q C Q with Q = Aᵀ A (`adapter_moment`): A is random at first, which hides
            the inputs' directions.
        adapter_ratio: the ratio of A itself, which an update with a random B has in expectation; adapter_z,
            adapter_p_value: of the fraction against such updates.
        directions: the directions of a subspace, where its moment has fewer than k; ratios are over d by it.
        tokens_per_dimension: held-out tokens behind the inputs' moment, for each of the d dimensions.
        forward_increment_ratio: of write matrices along a trajectory from random weights, the change since
            the checkpoint before, in the prediction subspace of that checkpoint.
        delta_norm: ‖dW‖_F, in the units of the weights. moved_share: share of entries that changed.
        rounding_share: share of ‖dW‖² that rounding alone would give, for checkpoints in bf16 or fp16 and for
            quantised ones; not of trainings of a run, which start from the stored values.
        ratio_mean: the mean over the layers (and experts) of one kind of matrix, or over all of a pathway
            where `matrix` is "". ratio_mean_null_sd, ratio_mean_z: of that mean under one Haar rotation of
            all its updates together (`geometry.joint_null`), since matrices share directions and
            subspaces; above d = 256 the sd of reads has the error of its sketches. ratio_mean_p_value: of
            a mean over writes, which one subspace serves.
        delta_norm, relative_norm, moved_share, visible_share, rounding_share of every parameter outside the
            residual-stream map (embeddings, norms, biases, ...; `parameter_rows`), named in the column
            `parameter`; embedding_... and token_... of the embeddings (`embedding_rows`, `token_rows`).
        product_norm, query_ratio, key_ratio, write_ratio, read_ratio, sum_ratio, ... with `products`: of
            W_Qᵀ W_K (`qk`) and W_O W_V (`ov`) of every head, on both of their sides (`product_rows`).
        frame_fraction, frame_ratio, frame_null_ratio_mean, frame_z, frame_p_value, ...: the same in each of
            the given `frames`, whose name is in the column `subspace`; of a file k is the number of its
            directions. permuted_frame_ratio_mean, permuted_frame_ratio_sd, permuted_frame_p_value: of
            contrasts, with the labels of the two groups shuffled, 39 times.
        frame_overlap, null_frame_overlap_mean, null_frame_overlap_sd: ‖Uᵀ V‖²_F / min(k_U, k_V) of a frame
            and the matrix's own subspace, or of two frames (`subspace` is a pair `one:other`), with the mean
            max(k_U, k_V) / d and the spread if either is random, in closed form. arXiv:2505.14185.
        group_overlap, null_group_overlap_mean, permuted_group_overlap_mean, permuted_group_overlap_sd,
            group_overlap_p_value: of the leading directions of a contrast's two groups
            (`ContrastSubspace.group_overlaps`); p is one-sided: do they share less than shuffled groups?
        increment_ratio, increment_...: the same of the change since the checkpoint before, with `increments`,
            in the same subspaces; increment_norm is its size.

    `k` defaults to d/8 (ours). `at` is whose subspaces are taken: the trajectory's `start`, the
    measured `step` itself or the `end`; `auto` is the start, or the step where the start is random.
    With `per_head` the heads of q, k, v and o have rows of their own, numbered in the column `head`;
    those of k and v are the key-value groups.
    """

    declaration: ClassVar[ProbeDeclaration] = ProbeDeclaration(
        headline="ratio",
        label="relative subspace fraction",
        share="fraction",
        form=".2f",
        section=ASYMMETRY,
        of_pretraining=True,
        divisible=True,
        harmless=("budget_gb", "products", "frames"),
    )

    k: int | list[int] | None = None
    at: Literal["auto", "start", "step", "end"] = "auto"
    null_kind: Literal["rotation", "isotropic"] = "rotation"
    per_head: bool = False
    products: bool = False  # also W_Qᵀ W_K and W_O W_V of each head, on both of their sides
    frames: Frames = Field(
        default_factory=dict
    )  # further subspaces by name: a file, or two groups of prompts
    increments: bool = False  # also the updates between neighbouring checkpoints
    tokens: int | None = Field(default=None, ge=2)  # of held-out text; None: 64 a dimension, at least 8192
    length: int = Field(default=96, ge=2)  # tokens a sequence
    text: Literal["raw", "chat"] = "raw"  # chat: held-out conversations, by the tokenizer's chat template
    prompts: int = Field(default=128, ge=0)  # of training examples, for upstream gradients; 0: none
    resamples: int = Field(default=40, ge=0)  # of the bootstrap over prompts; 0: no intervals
    groups: int = Field(default=16, ge=2)  # of prompts, which the bootstrap draws
    centre_inputs: bool = False
    centre_unembedding: bool = True
    fold_gain: bool = True  # the final norm's gain, into the unembedding
    fold_post_norm: bool = True  # the gain of a norm behind o and down (OLMo-2, Gemma-2), into them
    budget_gb: float | None = Field(default=None, gt=0)  # GiB for weights and moments; None: no limit

    def check(self, architecture: Architecture) -> None:
        """Refuse a k that does not fit."""
        check_dimensions(self.k, architecture.d_model, "probe.rsf.k")
        check_frames(self.frames, architecture, "probe.rsf.frames")
        if self.products:
            check_products(architecture)

    def check_examples(self, examples: Examples) -> None:
        """Refuse groups of prompts that are missing or too small."""
        check_frame_prompts(self.frames, examples, "probe.rsf.frames")

    def held(self, shape: Shape, objective: bool) -> float:
        """Peak bytes: those of the pass over gradients, or of its results and the frames of all inputs.

        Of each moment a root is kept, of each frame the bases of the bootstrap; of adapters also the matrix
        of each group of prompts, which is held of some layers at a time otherwise.
        """
        groups = self.groups if self.resamples else 1
        d, k = shape.d_model, dimensions(self.k, shape.d_model)[-1]
        moment = groups_size(d, groups)
        single = 1 if d > EXACT else 2  # roots in fp32 or fp64, bases of the bootstrap in fp16 or fp32
        budget = float("inf") if self.budget_gb is None else self.budget_gb * GIB
        gradients = objective and self.prompts > 0
        writes = shape.layers * (1 if shape.parallel else 2)
        batch = shape.passing(2 * BATCH_PROMPTS * shape.longest)
        whole_inputs = shape.adapted or self.at == "step"
        of_groups = shape.square * groups if whole_inputs else shape.square
        roots, inputs = single * shape.square * writes, 2 * shape.layers * of_groups
        batch_sums = min(shape.square * writes + inputs, max(budget, of_groups))
        roots += inputs if whole_inputs else 2 * shape.layers * (single * shape.square + 8.0 * groups * k)
        gathered = shape.weights + batch + batch_sums + roots if gradients else 0.0
        upstream = roots if gradients else 0.0
        drawn = 2.0 * single * d * k * self.resamples
        frame = single * shape.square + 24.0 * d * k + drawn
        if shape.adapted:
            frame += shape.square * groups + 2 * shape.square
        bases = 8.0 * d * k * shape.layers if self.products else 0.0
        weights = shape.weights if shape.weights <= budget / 2 else shape.weights / shape.layers
        states = 4.0 * d * (self.tokens or most_tokens(d))
        walked = states <= budget / 4
        limit = min(budget / 4, SUMS) if walked else budget / 2
        whole = 2 * moment + (states if shape.mixture else 0.0)  # a layer's; experts are made of tokens
        least = max(moment, states) if shape.mixture else moment
        held = min(shape.layers * whole, max(limit, least)) + (states if walked else 0.0)
        turned = min(1.0, 3 * k / d) * shape.square * groups / (2 if packs(d, groups) else 1)
        made = turned + 10 * shape.square
        twice = gradients or shape.compared > 1
        all_kept = self.budget_gb is None and self.at != "step" and not shape.mixture and twice
        kept = 2 * shape.layers * frame if all_kept else frame
        return max(gathered, upstream + weights + held + kept + bases + made)

    def figures(self, tables: "Mapping[str, pd.DataFrame]") -> "Mapping[str, Figure]":
        """The ratio by step and by layer; of a chain by stage, and by layer against the stage before."""
        from weightgeom.figures import base as figures
        from weightgeom.figures.chain import ratio_by_stage

        if "stages" in tables:
            if not len(own(tables["stages"], "ratio")):  # nothing moved anywhere
                return {}
            between = tables["between"]
            moved = set(own(between, "ratio")["step"])
            by_layer = {
                f"ratio_by_layer_{name}": figures.ratio_by_layer(between, step)
                for step, name in enumerate(between.attrs["stages"])
                if step in moved
            }
            return {"stages": ratio_by_stage(tables["stages"]), **by_layer}
        moved = {name: table for name, table in tables.items() if len(own(table, "ratio"))}
        if not moved:
            return {}
        drawn = {"ratio_by_step": figures.ratio_by_step(moved)}
        increments = {name: table for name, table in moved.items() if len(own(table, "increment_ratio"))}
        if increments:
            drawn["increment_by_step"] = figures.ratio_by_step(increments, "increment_ratio")
        for name, table in moved.items():
            suffix = "_pretraining" if name == "pretraining" and len(moved) > 1 else ""
            drawn[f"ratio_by_layer{suffix}"] = figures.ratio_by_layer(table, max(map(int, table["step"])))
        return drawn

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        """The measurement of one checkpoint's update since the trajectory's start."""
        at = ("step" if setting.from_random else "start") if self.at == "auto" else self.at
        kept: dict[bool, list[Frame]] = {}
        shared: list[Path] = []  # the directory of the frames
        upstream: dict[str, Settled | Moment] = {}
        given: list[GivenSubspace] = []
        architecture = setting.model.architecture
        matrices = architecture.matrices
        before: list[Params] = [setting.start if setting.before is None else setting.before]
        wanted = places_needed(architecture) | (product_places(architecture) if self.products else set())

        def frames(params: Params) -> Iterable[Frame]:
            whose = {"start": setting.start, "step": params, "end": setting.end}[at]
            settled = not isinstance(params, Adapted) and not isinstance(setting.end, Adapted)
            if setting.shared is not None and settled and at != "step":
                if not shared:
                    shared.append(setting.shared(partial(keep_frames, self._frames(setting, whose, settled))))
                return kept_frames(shared[0])
            # A budget is kept by holding one pass at a time, and so are the frames of many experts; nor are
            # those of two checkpoints asked for twice, unless moments of trained inputs are.
            once = len(setting.checkpoints) <= 2 and setting.objective is None
            if at == "step" or once or self.budget_gb is not None or architecture.stacks:
                return self._frames(setting, whose, settled)
            if settled not in kept:
                kept.clear()
                kept[settled] = list(self._frames(setting, whose, settled))
                trim_memory()  # of the passes over the text
            return kept[settled]

        def measure(params: Params) -> list[Row]:
            previous = before.pop()
            before.append(params)
            unmoved = all(_unmoved(matrix, params, setting.start) for matrix in matrices)
            if unmoved and not embeddings_moved(setting, params):
                updates = ((matrix, self._update(matrix, params, setting)) for matrix in matrices)
                sizes = [entry for matrix, update in updates for entry in _size(matrix, update)]
                return [*sizes, *other_rows(setting, params, {}, ())]
            if not upstream and setting.objective is not None and self.prompts:
                fixed = {"start": setting.start, "end": setting.end}.get(at)
                adapted = isinstance(params, Adapted) or isinstance(setting.end, Adapted)
                spaces = (
                    {} if fixed is None or adapted else {frame.place: frame.space for frame in frames(params)}
                )
                upstream.update(self._upstream(setting, fixed, spaces))
            if self.frames and not given:
                given.extend(given_subspaces(self.frames, setting, self._largest(setting)))
            chance = random_frame(setting, self._largest(setting))
            rows: dict[str, list[Row]] = {}
            d = architecture.d_model
            places: dict[Place, Frame] = {}
            pathways = Pathways(dimensions(self.k, d), d, setting.seed)
            written = self._prediction(setting, previous) if setting.from_random else None
            for frame, here in in_walk(frames(params), architecture):
                if frame.place in wanted:
                    places[frame.place] = Frame(frame.place, frame.space, rank=frame.rank)
                for matrix in here:
                    made = self._rows(
                        matrix, params, setting, frame, chance, upstream.get(matrix.name), pathways, given
                    )
                    rows[matrix.name] = list(made)
                    if self.increments:
                        rows[matrix.name] += self._increment(matrix, params, previous, frame, setting.seed)
                    if written is not None and matrix.role == "write":
                        rows[matrix.name] += self._forward(matrix, params, previous, written)
                del frame  # before the next sums are made
            for matrix in matrices:
                if matrix.name not in rows:  # an expert without tokens
                    rows[matrix.name] = list(_size(matrix, self._update(matrix, params, setting)))
            in_order = [entry for matrix in matrices for entry in rows[matrix.name]]
            warn_of_rounding(in_order)
            of_matrices = [*in_order, *_q_values(in_order), *pathways.rows(_ratios(in_order))]
            return [*of_matrices, *self._others(setting, params, places)]

        return measure

    def _largest(self, setting: Setting) -> int:
        return dimensions(self.k, setting.model.architecture.d_model)[-1]

    def _update(self, matrix: ResidualMatrix, params: Params, setting: Setting) -> Update:
        update = update_of(matrix, params, setting.start, written=self.fold_post_norm)
        # A training of ours starts from the stored values and keeps its own in fp32.
        return update if setting.objective is None else replace(update, rounding_share=None)

    def _others(self, setting: Setting, params: Params, places: Mapping[Place, Frame]) -> Iterator[Row]:
        """Parameters outside of the map and, where asked for, the products of heads."""
        wanted = dimensions(self.k, setting.model.architecture.d_model)
        yield from other_rows(setting, params, places, wanted)
        if self.products:
            yield from product_rows(setting, params, places, wanted, written=self.fold_post_norm)

    def _frames(self, setting: Setting, params: Params, settled: bool) -> Iterator[Frame]:
        d = setting.model.architecture.d_model
        inputs = Inputs(
            tokens=self.tokens or most_tokens(d),
            length=self.length,
            centre=self.centre_inputs,
            groups=self.groups,
            resamples=self.resamples,
            budget_gb=self.budget_gb,
            text=self.text,
            crossfit=True,
            experts=True,
            final=unembedding_moves(setting),
            settled=settled,  # the level of an adapter needs the groups
        )
        yield self._prediction(setting, params)
        yield from input_frames(setting, params, self._largest(setting), inputs)

    def _upstream(
        self, setting: Setting, params: Params | None, spaces: Mapping[Place, Subspace]
    ) -> dict[str, Settled | Moment]:
        """Second moments on training examples at the start, by matrix, where the objective is known.

        Of a matrix that writes those of the upstream gradients, of one that reads those of its inputs. Groups
        of prompts are resampled inside the prediction subspace of `params` in the former, and inside `spaces`
        in the latter, where these are the same at all checkpoints.
        """
        if setting.objective is None or setting.training is None or not self.prompts:
            return {}
        gathering = Gathering(
            prompts=self.prompts,
            gradients=False,
            groups=self.groups if self.resamples else 1,
            batch_size=BATCH_PROMPTS,
            budget_gb=self.budget_gb,
        )
        writes = [matrix for matrix in setting.model.architecture.matrices if matrix.role == "write"]
        gains = {matrix.name: matrix.gain(setting.start) for matrix in writes if self.fold_post_norm}
        if params is not None:
            spaces = {**spaces, PREDICTION: self._prediction(setting, params).space}
        passes = gradient_moments(
            *(setting.model, setting.start, setting.objective, setting.training, setting.examples),
            *(gathering, setting.seed, spaces),
            {name: gain for name, gain in gains.items() if gain is not None},
        )
        moments: dict[str, Settled | Moment] = {}
        for one_pass in passes:
            trim_memory()  # of the passes over the examples
            settled: dict[Place, Settled | Moment] = {
                (site.name, site.layer): _settled(one_pass.inputs.pop(site)) for site in list(one_pass.inputs)
            }
            written = {name: _settled(one_pass.upstream.pop(name)) for name in list(one_pass.upstream)}
            for matrix in setting.model.architecture.matrices:
                if place_of(matrix) in settled:
                    moments[matrix.name] = settled[place_of(matrix)]
                elif matrix.name in written:
                    moments[matrix.name] = written[matrix.name]
            trim_memory()  # of the sums
        return moments

    def _prediction(self, setting: Setting, params: Params) -> Frame:
        return prediction_frame(
            setting,
            params,
            self._largest(setting),
            fold_gain=self.fold_gain,
            centre=self.centre_unembedding,
        )

    def _rows(
        self,
        matrix: ResidualMatrix,
        params: Params,
        setting: Setting,
        own: Frame,
        chance: Frame,
        trained: Moment | Settled | None,
        pathways: Pathways,
        given: Sequence[GivenSubspace],
    ) -> Iterator[Row]:
        moment = own.moment if matrix.role == "read" else trained
        update = self._update(matrix, params, setting)
        yield from _size(matrix, update)
        where = matrix.table_columns
        if own.moment is not None:
            yield row("tokens_per_dimension", own.per_dimension, n=own.moment.samples, **where)
        spectrum = self._spectrum(update)
        if spectrum is not None:
            pathways.add(matrix, update.gram, own)
        inputs = trained if matrix.role == "read" else None
        yield from self._compare(update, spectrum, own, moment, setting.seed, where, inputs)
        yield from self._compare(update, spectrum, chance, None, setting.seed, where)
        if given and spectrum is not None:
            yield from self._given(matrix, update, spectrum, own, given, setting.seed)
        if self.per_head and matrix.has_heads:
            heads = head_updates(matrix, params, setting.start, written=self.fold_post_norm)
            for head, part in enumerate(heads):
                place = where | {"head": head}
                yield from self._compare(part, self._spectrum(part), own, moment, setting.seed, place)

    def _given(
        self,
        matrix: ResidualMatrix,
        update: Update,
        spectrum: Float[Tensor, " d"],
        own: Frame,
        given: Sequence[GivenSubspace],
        seed: int,
    ) -> Iterator[Row]:
        """The update in the given subspaces, and these against each other and the matrix's own."""
        where, gram = matrix.table_columns, update.gram.cpu().double()
        asked = dimensions(self.k, len(gram))
        spaces = {subspace.name: space for subspace in given if (space := subspace.at(matrix)) is not None}
        for subspace in given:
            if subspace.name not in spaces:
                continue
            space, contrast = spaces[subspace.name], subspace.contrast(matrix)
            frame = Frame((subspace.name, matrix.layer), space, rank=space.basis.shape[1])
            wanted = subspace.dimensions(matrix, asked)
            for entry in self._compare(update, spectrum, frame, None, seed, where, wanted=wanted):
                yield entry | {"quantity": f"frame_{entry['quantity']}"}
            if contrast is not None:
                place = where | {"subspace": subspace.name}
                for k in wanted:
                    yield from permuted_rows(contrast, gram, k, place)
                yield from group_rows(contrast, **place)
        whole = own.space.first(own.directions(own.space.basis.shape[1]))
        yield from overlap_rows(spaces | {own.place[0]: whole}, **where)

    def _increment(
        self, matrix: ResidualMatrix, params: Params, previous: Params, own: Frame, seed: int
    ) -> Iterator[Row]:
        """The update since the checkpoint before."""
        update = update_of(matrix, params, previous, written=self.fold_post_norm)
        where = matrix.table_columns
        n = update.shape[0] * update.shape[1]
        yield row("increment_norm", update.norm, n=n, **where)
        for entry in self._compare(update, self._spectrum(update), own, None, seed, where):
            yield entry | {"quantity": f"increment_{entry['quantity']}"}

    def _forward(
        self, matrix: ResidualMatrix, params: Params, previous: Params, frame: Frame
    ) -> Iterator[Row]:
        """The update since the checkpoint before, in the prediction subspace of that checkpoint."""
        update = update_of(matrix, params, previous, written=self.fold_post_norm)
        if not update.norm > 0:
            return
        gram = update.gram.cpu().double()
        n, inside = update.shape[0] * update.shape[1], frame.space.shares(gram).cumsum(0)
        for k in dimensions(self.k, len(gram)):
            at = matrix.table_columns | {"subspace": frame.place[0], "k": k}
            yield row("forward_increment_ratio", float(inside[k - 1]) * len(gram) / k, n=n, **at)

    def _spectrum(self, update: Update) -> Float[Tensor, " d"] | None:
        """The spectrum that the rotation null of an update needs; None where nothing moved."""
        return spectrum_shares(update.gram.cpu()) if update.norm > 0 else None

    def _compare(
        self,
        update: Update,
        spectrum: Float[Tensor, " d"] | None,
        frame: Frame,
        moment: Moment | Settled | None,
        seed: int,
        where: dict,
        trained: Moment | Settled | None = None,
        wanted: Sequence[int] | None = None,
    ) -> Iterator[Row]:
        if spectrum is None:  # no share of nothing lies anywhere
            return
        gram = update.gram.cpu().double()
        d, entries = len(gram), update.shape[0] * update.shape[1]
        inside = frame.space.shares(gram).cumsum(0)
        drawn = None if frame.resampled is None else frame.resampled.explained(gram)
        for asked in dimensions(self.k, d) if wanted is None else wanted:
            at = where | {"subspace": frame.place[0], "k": asked}
            k = frame.directions(asked)
            if k < asked:
                yield row("directions", float(k), n=entries, **at)
            fraction, scale = float(inside[k - 1]), d / k
            if self.null_kind == "rotation":
                null = rotation_null(spectrum, k, seed)
            else:
                null = isotropic_null(d, k, entries // d)
            groups = 0 if frame.moment is None else frame.moment.groups
            interval = bootstrap_interval(
                fraction, [] if drawn is None else drawn[:, k - 1].tolist(), groups, frame.per_dimension
            )
            stderr = None if interval is None else interval.stderr
            yield row("fraction", fraction, n=entries, stderr=stderr, **at)
            yield row(
                "ratio", fraction * scale, n=entries, stderr=None if stderr is None else stderr * scale, **at
            )
            if interval is not None:
                yield row("ratio_low", max(0.0, interval.low) * scale, n=entries, **at)
                yield row("ratio_high", min(1.0, interval.high) * scale, n=entries, **at)
            yield row("null_ratio_mean", null.mean * scale, n=entries, **at)
            yield row("null_ratio_sd", null.sd * scale, n=entries, **at)
            yield row("z", null.z(fraction), n=entries, **at)
            p, error = null.p_value(fraction)
            yield row("p_value", p, n=entries, stderr=error, **at)
            adapter = update.adapter
            if adapter is not None and (frame.moment is not None or wanted is not None):
                adapter = adapter.cpu().double()
                yield from _of_adapter(gram, adapter, fraction, frame, k, seed, at)
            if moment is not None and not moment.centred:
                yield from _matched(gram, fraction, frame, k, moment, self.resamples, seed, at, adapter)
            if trained is not None:
                space = frame.space.first(k)
                yield from _trained(gram, fraction, space, trained, self.resamples, seed, at, adapter)


def _settled(moment: Moment) -> Settled | Moment:
    """The moment without its groups' matrices, where what they have inside a subspace was summed."""
    return moment if moment.within is None else moment.settled()


def _matched(
    gram: Float[Tensor, "d d"],
    fraction: float,
    frame: Frame,
    k: int,
    moment: Moment | Settled,
    resamples: int,
    seed: int,
    at: dict,
    adapter: Float[Tensor, "r d"] | None = None,
) -> Iterator[Row]:
    """The level expected if inputs and upstream gradients were independent, and p against it."""

    def seen(value: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
        value = value.cpu().double()
        return value if adapter is None else adapter_moment(adapter, value)

    space, scale, n = frame.space.first(k), len(gram) / k, moment.samples
    root = moment.root if adapter is None else moment_root(seen(moment.value))
    null = matched_null(gram, root, space, seed)
    if adapter is not None:
        assert isinstance(moment, Moment), "of adapters all groups are kept"
        drawn = [float(space.shares(seen(value)).sum()) for value in moment.resampled(resamples, seed)]
    elif frame.resampled is not None:
        drawn = frame.resampled.shares[:, :k].sum(1).tolist()
    else:  # the subspace is not estimated from data; the moment is
        drawn = moment.resampled_levels(space, resamples, seed)[:, -1].tolist()
    interval = bootstrap_interval(null.mean, drawn, moment.groups)
    stderr = None if interval is None else interval.stderr * scale
    yield row("matched_ratio", null.mean * scale, n=n, stderr=stderr, **at)
    if interval is not None:
        yield row("matched_ratio_low", max(0.0, interval.low) * scale, n=n, **at)
        yield row("matched_ratio_high", min(1.0, interval.high) * scale, n=n, **at)
    if frame.crossfit:
        spaces = [space.first(k) for space, _ in frame.crossfit]
        levels = [float(shares[:k].sum()) for _, shares in frame.crossfit]
        if adapter is not None:
            halves = moment.halves() if isinstance(moment, Moment) else None
            assert halves is not None
            levels = [
                float(half.shares(seen(other.value)).sum())
                for half, other in zip(spaces, halves[::-1], strict=True)
            ]
        fraction = sum(float(half.shares(gram).sum()) for half in spaces) / 2
        yield row("crossfit_ratio", fraction * scale, n=n, **at)
        yield row("crossfit_matched_ratio", sum(levels) / 2 * scale, n=n, **at)
        fraction *= 2 * null.mean / sum(levels)  # the null's level is that of the subspace's own text
    error = 0.0 if interval is None else interval.stderr / null.mean * widening(frame.per_dimension)
    estimated = Estimated(null, error, moment.groups - 1)
    yield row("matched_z", estimated.z(fraction), n=n, **at)
    p, error = estimated.p_value(fraction)
    yield row("matched_p_value", p, n=n, stderr=error, **at)


def _trained(
    gram: Float[Tensor, "d d"],
    fraction: float,
    space: Subspace,
    moment: Moment | Settled,
    resamples: int,
    seed: int,
    at: dict,
    adapter: Float[Tensor, "r d"] | None,
) -> Iterator[Row]:
    """The matched level of the inputs on training examples, and p against it.

    The subspace is that of held-out text, so that it is not fitted to this moment and needs no cross-fitting.
    """

    def seen(value: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
        value = value.cpu().double()
        return value if adapter is None else adapter_moment(adapter, value)

    root = moment.root if adapter is None else moment_root(seen(moment.value))
    null, scale, n = matched_null(gram, root, space, seed), len(gram) / space.basis.shape[1], moment.samples
    if adapter is None:
        drawn = moment.resampled_levels(space, resamples, seed)[:, -1].tolist()
    else:
        assert isinstance(moment, Moment), "of adapters all groups are kept"
        drawn = [float(space.shares(seen(value)).sum()) for value in moment.resampled(resamples, seed)]
    interval = bootstrap_interval(null.mean, drawn, moment.groups)
    stderr = None if interval is None else interval.stderr * scale
    yield row("trained_matched_ratio", null.mean * scale, n=n, stderr=stderr, **at)
    if interval is not None:
        yield row("trained_matched_ratio_low", max(0.0, interval.low) * scale, n=n, **at)
        yield row("trained_matched_ratio_high", min(1.0, interval.high) * scale, n=n, **at)
    estimated = Estimated(null, 0.0 if interval is None else interval.stderr / null.mean, moment.groups - 1)
    yield row("trained_matched_z", estimated.z(fraction), n=n, **at)
    p, error = estimated.p_value(fraction)
    yield row("trained_matched_p_value", p, n=n, stderr=error, **at)


def _of_adapter(
    gram: Float[Tensor, "d d"],
    adapter: Float[Tensor, "r d"],
    fraction: float,
    frame: Frame,
    k: int,
    seed: int,
    at: dict,
) -> Iterator[Row]:
    """The reads of an adapter against those of a random B: they lie in the row space of its A."""
    null = matched_null(gram, moment_root(adapter.T @ adapter), frame.space.first(k), seed)
    yield row("adapter_rank", float(len(adapter)), n=len(adapter), **at)
    yield row("adapter_ratio", null.mean * len(gram) / k, n=len(adapter), **at)
    yield row("adapter_z", null.z(fraction), n=len(adapter), **at)
    p, error = null.p_value(fraction)
    yield row("adapter_p_value", p, n=len(adapter), stderr=error, **at)


def _size(matrix: ResidualMatrix, update: Update) -> Iterator[Row]:
    where = matrix.table_columns
    entries = update.shape[0] * update.shape[1]
    yield row("delta_norm", update.norm, n=entries, **where)
    yield row("moved_share", update.moved_share, n=entries, **where)
    if update.rounding_share is not None:
        yield row("rounding_share", update.rounding_share, n=entries, **where)


def _ratios(rows: Iterable[Row]) -> Iterator[Row]:
    """The ratios of matrices, no heads, at their own subspaces."""
    for entry in rows:
        if entry["quantity"] == "ratio" and entry["subspace"] != "random" and entry.get("head") is None:
            yield entry


def _unmoved(matrix: ResidualMatrix, params: Params, start: Params) -> bool:
    names = [matrix.parameter, *([matrix.norm.parameter] if matrix.norm is not None else [])]
    return all(torch.equal(params[name], start[name]) for name in names)


def _q_values(rows: Iterable[Row]) -> Iterator[Row]:
    """Benjamini and Hochberg's q for every p: over all layers and matrices at the same kind of place."""
    from scipy.stats import false_discovery_control

    families: dict[tuple, list[Row]] = {}
    for entry in rows:
        if entry["quantity"] in TESTED:
            part = (
                "head" if entry.get("head") is not None else "expert" if entry["expert"] is not None else ""
            )
            given = entry["subspace"] if "frame" in entry["quantity"] else ""
            family = entry["quantity"], entry["k"], entry["subspace"] == "random", part, given
            families.setdefault(family, []).append(entry)
    for (quantity, *_), family in families.items():
        q_values = false_discovery_control([entry["value"] for entry in family])
        name = quantity.replace("p_value", "q_value")
        for entry, q in zip(family, q_values, strict=True):
            yield entry | {"quantity": name, "value": float(q), "stderr": None, "n": len(family)}

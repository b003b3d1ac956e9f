"""Uncertainty that is detected but not expressed: where groups part, and whether the output sees it."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.analysis.claims_uncertainty import base_step
from weightgeom.declarations import UNCERTAINTY, ProbeDeclaration
from weightgeom.estimators.hidden_states import Tail, check_layers, last_states
from weightgeom.estimators.reference_subspaces import check_dimensions, dimensions
from weightgeom.geometry.subspace import Subspace, prediction_moment
from weightgeom.interfaces import Setting
from weightgeom.models.residual import Architecture
from weightgeom.params import Params
from weightgeom.table import Row, arm_columns
from weightgeom.text.examples import Examples, Question
from weightgeom.text.prompt_groups import check_groups, equal_groups, first_tokens
from weightgeom.uncertainty.contrast import Contrast, permuted_aurocs
from weightgeom.uncertainty.intrinsic_dimension import check_neighbours
from weightgeom.uncertainty.rows import (
    EstimateSettings,
    best_layer_rows,
    boundary_rows,
    group_rows,
    output_rows,
    overlap_rows,
    shape_rows,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Uncertainty:
    """The residual stream behind every layer at the last token of the prompts, group against group.

    The column `treatment` names a group, and in a comparison `against` names the factual one, the first of
    the groups; `dose` is a threshold t. In `arm` a comparison reads `uncertain/factual`, or with a threshold
    `uncertain@t/factual`. Groups are cut to one size. The boundary direction b is the difference of the
    means on a training half, and is evaluated on the other half. A `_p_value` is by permutation
    of the groups' labels and a `_random_p_value` against Haar-random directions, both two-sided; `_low` and
    `_high` are the ends of a 95 % interval, `_permuted` and `_random` the mean under a null.

    Quantities:
        auroc_projection, auroc_logistic: of the projection on b and of a logistic probe, in [0, 1];
            `_max_p_value`, one-sided, among the best layers of permuted labels: of the best layer, it
            counts that it was chosen.
        amplification: difference of the means along b over the norm of a state.
        mle_dimension, twonn_dimension: intrinsic dimension, > 0; `_calibrated` on as many Gaussian points;
            `_ratio`, of the uncertain group to the factual one.
        overlap: squared fraction of b in the unembedding's top or bottom k directions over k/d, [0, d/k].
        components@t, persistence_entropy, longest_loop: of the Rips filtration by cosine distance, components
            as a share of the points; `_difference`, uncertain - factual.
        fisher_sensitivity: symmetric KL of the predictions at h and h + ε b over ε², ε as a share of the norm
            of h, nats, >= 0; `fisher_ratio` over that of random directions, `fisher_output_ratio` over
            that of the top output directions; `fisher_quadratic_difference` is left between ε and ε/2.
        gradient_coupling: cosine of b with the gradient of the abstentions' summed first logits, in [-1, 1].
    Source: arXiv:2603.13911v1; held-out halves, equal sizes, calibration, nulls and intervals are ours.
    """

    declaration: ClassVar[ProbeDeclaration] = ProbeDeclaration(
        headline="",
        section=UNCERTAINTY,
        whole=(  # of hundreds: means over layers and groups
            *("auroc_logistic", "amplification", "mle_dimension_calibrated_ratio"),
            *("fisher_ratio", "gradient_coupling"),
        ),
        compares=False,
        needs_update=False,
        generic=False,
        divisible=True,
    )

    layers: list[int] | None = None
    k: int | None = None
    prompts: int = Field(default=120, ge=8)
    neighbours: int = Field(default=30, ge=2)
    points: int = Field(default=48, ge=4)
    thresholds: list[float] = Field(default_factory=lambda: [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5])
    permutations: int = Field(default=39, ge=1)
    refits: int = Field(default=39, ge=0)  # permutations for which the logistic probe is fitted anew
    random: int = Field(default=39, ge=2)
    output: int = Field(default=4, ge=1)
    sensitivity_prompts: int = Field(default=32, ge=4)
    resamples: int = Field(default=40, ge=0)

    def __post_init__(self) -> None:
        """Refuse thresholds that no cosine distance has."""
        if bad := [threshold for threshold in self.thresholds if not 0 <= threshold <= 2]:
            raise ValueError(f"thresholds are cosine distances, 0 to 2, got {bad[0]}")

    def check(self, architecture: Architecture) -> None:
        """Refuse layers and dimensions that the model does not have."""
        check_layers(self.layers, architecture)
        check_dimensions(self.k, architecture.d_model, "probe.uncertainty.k")
        if self.output > architecture.d_model:
            raise ValueError(f"output is at most {architecture.d_model}, the width of the residual stream")

    def check_examples(self, examples: Examples) -> None:
        """Refuse data without groups, and groups that are too small."""
        check_groups(examples)
        size = min(self.prompts, *map(len, examples.groups.values()))
        check_neighbours(size, self.neighbours)
        if size < 8:
            raise ValueError(f"the smallest group has {size} prompts: give 8 or more of each")

    def figures(self, tables: "Mapping[str, pd.DataFrame]") -> "Mapping[str, Figure]":
        """Profiles over layers, topology and sensitivity of the base; after a training the profiles again."""
        from weightgeom.figures import uncertainty as figures

        table = tables.get("training")
        if table is None:
            return {}
        trained = bool(table.attrs.get("trained"))
        step = base_step(table, trained)
        drawn = {
            "uncertainty_profiles": figures.profiles(table, step),
            "uncertainty_topology": figures.topology(table, step),
            "uncertainty_sensitivity": figures.sensitivity(table, step),
        }
        if trained:
            drawn["uncertainty_profiles_trained"] = figures.profiles(table, max(map(int, table["step"])))
        return drawn

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        """The measurement of one checkpoint."""
        self.check_examples(setting.examples)
        groups = equal_groups(setting.examples.groups, self.prompts, setting.seed)
        tokens = first_tokens(setting.examples.abstentions, setting.model.tokenizer)
        return lambda params: list(self._rows(setting, params, groups, tokens))

    def _rows(
        self, setting: Setting, params: Params, groups: dict[str, list[Question]], tokens: Sequence[int]
    ) -> Iterator[Row]:
        model, architecture = setting.model, setting.model.architecture
        network = model.with_weights(params).requires_grad_(False).eval()
        layers = list(range(architecture.n_layers)) if self.layers is None else sorted(set(self.layers))
        texts = {name: [question.prompt for question in group] for name, group in groups.items()}
        states = {name: last_states(model, network, prompts, layers) for name, prompts in texts.items()}
        factual, *uncertain = texts
        asked = EstimateSettings(
            self.neighbours, self.points, self.thresholds, self.resamples, self.random, setting.seed
        )
        contrast = Contrast.of(len(texts[factual]), self.permutations, setting.seed)
        held = contrast.test[0, 0, : self.sensitivity_prompts].tolist()  # of either group, as they are pooled
        spaces, output = self._output(params, architecture)
        aurocs: dict[str, dict[int, dict[str, torch.Tensor]]] = {name: {} for name in uncertain}
        for layer in layers:
            place = {"layer": layer, "subspace": "residual"}
            for name in texts:
                for entry in group_rows(states[name][layer], arm_columns(name), asked):
                    yield {**place, **entry}
            for name in uncertain:
                arm = arm_columns(name, against=factual)
                pooled = torch.cat([states[factual][layer], states[name][layer]])
                aurocs[name][layer] = permuted_aurocs(pooled, contrast, self.refits)
                directions = contrast.boundaries(pooled)
                tail = Tail.of(
                    model, network, [texts[side][i] for side in (factual, name) for i in held], layer
                )
                # The rows that run the network come first: they are the ones that may fail.
                outputs = output_rows(
                    tail, tail.states, directions.to(model.device), output, tokens, arm, asked
                )
                for entry in (
                    *outputs,
                    *boundary_rows(pooled, contrast, arm),
                    *overlap_rows(pooled, contrast, spaces, arm, setting.seed),
                    *shape_rows(pooled, contrast, arm, asked),
                ):
                    yield {**place, **entry}
        for name, of_layers in aurocs.items():
            for entry in best_layer_rows(of_layers, arm_columns(name, against=factual)):
                yield {"subspace": "residual", **entry}

    def _output(self, params: Params, architecture: Architecture) -> tuple[dict[str, Subspace], torch.Tensor]:
        """Top and bottom right singular directions of the unembedding; and the first few of the top ones."""
        gain = architecture.final_norm.gain(params)
        moment = prediction_moment(architecture.unembedding(params), gain)
        d, k = architecture.d_model, dimensions(self.k, architecture.d_model)[0]
        axes = Subspace.top(moment.cpu(), d)
        spaces = {"output_top": axes.first(k), "output_bottom": Subspace(axes.basis[:, d - k :])}
        return spaces, axes.basis[:, : self.output].T.float()

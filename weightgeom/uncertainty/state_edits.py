"""Edits of hidden states instead of weights: additions after a layer or to the logits, and their effects."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.causal.effects import Samples
from weightgeom.causal.trials import Arm, Trial, check_controls, measured, with_q_values
from weightgeom.declarations import UNCERTAINTY, InterventionDeclaration
from weightgeom.estimators.hidden_states import Tail, check_layers, last_states
from weightgeom.geometry.divergences import divergences
from weightgeom.interfaces import Log, Setting
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import Architecture
from weightgeom.params import Params
from weightgeom.table import Row, arm_columns, row
from weightgeom.text.examples import Examples
from weightgeom.text.prompt_groups import check_groups, equal_groups, phrase_tokens
from weightgeom.text.tokens import Batch
from weightgeom.uncertainty.contrast import Contrast

# Of every edit of states; their figure is one for all of them.
OF_STATES = InterventionDeclaration(
    ("abstention_change", "kl_from_unedited"), ("random",), UNCERTAINTY, generic=False
)


@plain_dataclass(frozen=True, eq=False)
class StateEdit:
    """An addition to every prompt's state after a layer, and to its logits of an abstention.

    The state is the one at the prompt's last token. The logits are those of every abstention's first token,
    and of each later token after the tokens before it.
    """

    layer: int
    states: Float[Tensor, "prompt d"]
    logits: Float[Tensor, " prompt"]

    @property
    def norm(self) -> float:
        """The root mean square norm of the additions over prompts."""
        squares = self.states.double().square().sum(1) + self.logits.double().square()
        return float(squares.mean().sqrt())

    def scaled(self, factor: float) -> "StateEdit":
        """The edit multiplied by `factor`."""
        return StateEdit(self.layer, factor * self.states, factor * self.logits)


@dataclass(frozen=True)
class StateEditSettings:
    """The layers, prompts and number of controls of an experiment with state edits.

    `uncertain` is a group other than the first, by default the second. Directions are estimated on half of
    the prompts, effects are measured on the other half. Quantities, each a mean over prompts:
        abstention: share of uncertain prompts answered by an abstention, in [0, 1].
        false_abstention: share of factual prompts answered by an abstention, in [0, 1].
        factual_accuracy: share of factual prompts whose answer is the most likely one, token by token.
        kl_from_unedited: KL(unedited || edited) of the next token of factual prompts, nats, >= 0.
    """

    layers: list[int] | None = None
    at: Literal["auto", "start", "end"] = "auto"
    uncertain: str | None = None
    prompts: int = Field(default=120, ge=8)
    random: int = Field(default=19, ge=2)
    level: float = Field(default=0.05, gt=0, lt=1)

    def check(self, architecture: Architecture, strengths: Sequence[float]) -> None:
        """Refuse layers that the model lacks, too few controls, and strengths that are not positive."""
        check_layers(self.layers, architecture)
        check_controls(self.random, self.level)
        if bad := [strength for strength in strengths if not 0 < strength < float("inf")]:
            raise ValueError(f"strengths must be positive and finite, got {bad[0]}")

    def check_examples(self, examples: Examples) -> None:
        """Refuse data without groups, without the `uncertain` group, or without factual answers."""
        check_groups(examples)
        factual, *others = examples.groups
        if self.uncertain is not None and self.uncertain not in others:
            raise ValueError(f"unknown uncertain group {self.uncertain!r}; choose from {', '.join(others)}")
        if not any(question.answer for question in examples.groups[factual]):
            raise ValueError(
                f"no prompt of the group {factual!r} has an answer, so its accuracy is undefined: add answers"
            )

    def chosen_layers(self, architecture: Architecture) -> list[int]:
        """The edited layers; by default all."""
        return list(range(architecture.n_layers)) if self.layers is None else sorted(set(self.layers))


@plain_dataclass(frozen=True, eq=False)
class LayerStates:
    """The states at one layer: factual and uncertain ones to estimate directions, and the ones to edit."""

    layer: int
    factual: Float[Tensor, "factual d"]
    uncertain: Float[Tensor, "uncertain d"]
    edited: Float[Tensor, "prompt d"]

    @property
    def boundary(self) -> Float[Tensor, " d"]:
        """The boundary direction b, from the training halves."""
        difference = self.uncertain.mean(0) - self.factual.mean(0)
        return difference / difference.norm()

    @property
    def norm(self) -> float:
        """The root mean square norm of the edited states."""
        return float(self.edited.square().sum(1).mean().sqrt())


def states_and_evaluation(
    prompted: StateEditSettings, setting: Setting, params: Params
) -> tuple[list[LayerStates], "PromptEvaluation"]:
    """The states for edits, layer by layer, and the evaluation of edits on the test half."""
    prompted.check_examples(setting.examples)
    names = list(setting.examples.groups)
    pair = [names[0], prompted.uncertain or names[1]]
    groups = equal_groups(
        {name: setting.examples.groups[name] for name in pair}, prompted.prompts, setting.seed
    )
    size = len(groups[pair[0]])
    half = Contrast.of(size, 0, 0).train.shape[2]
    model = setting.model
    network = model.with_weights(params).requires_grad_(False).eval()
    layers = prompted.chosen_layers(model.architecture)
    states = {
        name: last_states(model, network, [question.prompt for question in group], layers)
        for name, group in groups.items()
    }
    factual, uncertain = (states[name] for name in pair)
    by_layer = [
        LayerStates(
            layer,
            factual[layer][:half],
            uncertain[layer][:half],
            torch.cat([factual[layer][half:], uncertain[layer][half:]]),
        )
        for layer in layers
    ]
    tested = [groups[name][half:] for name in pair]
    return by_layer, PromptEvaluation(model, network, tested, setting.examples.abstentions)


class PromptEvaluation:
    """Measures state edits on factual prompts followed by equally many uncertain ones.

    Every prompt is continued by each abstention, and by its answer, up to the last token of the continuation;
    a continuation counts as given if each of its tokens is the most likely one at its position.
    """

    def __init__(self, model: LanguageModel, network: Any, tested: list[Any], phrases: Sequence[str]) -> None:
        self.model, self.network = model, network
        factual, uncertain = tested
        self.factual = len(factual)
        questions = [*factual, *uncertain]
        starts = [list(model.tokenizer(question.prompt)["input_ids"]) for question in questions]
        self.phrases = phrase_tokens(phrases, model.tokenizer)
        self.first = sorted({ids[0] for ids in self.phrases})
        self.parts = [
            _ScoredPrompts.of(model, starts, [ids] * len(starts), range(len(starts)), True)
            for ids in self.phrases
        ]
        answered = [index for index, question in enumerate(factual) if question.answer]
        answers = [
            list(model.tokenizer(factual[index].answer, add_special_tokens=False)["input_ids"])
            for index in answered
        ]
        self.parts.append(_ScoredPrompts.of(model, [starts[i] for i in answered], answers, answered, False))
        self._tails: dict[tuple[int, int], Tail] = {}
        no_edit = StateEdit(
            model.architecture.n_layers - 1,
            torch.zeros(len(starts), model.architecture.d_model),
            torch.zeros(len(starts)),
        )
        self._base: Float[Tensor, "prompt vocabulary"] | None = None
        self.unedited, self._base = self._samples(no_edit)

    def changed_by(self, edit: StateEdit) -> Samples:
        """The changes caused by an edit, prompt by prompt; the KL is already a difference."""
        samples, _ = self._samples(edit)
        kl = "kl_from_unedited"
        return {
            name: values if name == kl else values - self.unedited[name] for name, values in samples.items()
        }

    @torch.no_grad()
    def _samples(self, edit: StateEdit) -> tuple[Samples, Float[Tensor, "any vocabulary"]]:
        right, start = [], torch.zeros(0)
        for number, part in enumerate(self.parts):
            key = edit.layer, number
            if key not in self._tails:  # edits are grouped by layer, so the tails of one layer suffice
                self._tails = {kept: tail for kept, tail in self._tails.items() if kept[0] == edit.layer}
                self._tails[key] = Tail.of_batch(self.model, self.network, part.batch, edit.layer)
            logits = self._tails[key].logits(edit.states[part.prompts], part.last, part.ids.shape[1])
            shift = edit.logits[part.prompts].to(logits)
            logits[:, 0, self.first] += shift[:, None]
            if part.abstains:
                for place in range(1, logits.shape[1]):
                    logits[torch.arange(len(logits)), place, part.ids[:, place]] += shift
            right.append(((logits.argmax(-1) == part.ids) | ~part.scored).all(1))
            start = logits[:, 0] if number == 0 else start
        *abstains, accurate = right
        abstains = torch.stack(abstains).any(0).float().cpu()
        base = start if self._base is None else self._base
        facts = slice(0, self.factual)
        divergence, _ = divergences(base[facts], base[facts].logsumexp(-1), start[facts])
        samples = {
            "abstention": abstains[self.factual :],
            "false_abstention": abstains[facts],
            "factual_accuracy": accurate.float().cpu(),
            "kl_from_unedited": divergence.cpu(),
        }
        return samples, start


@plain_dataclass(frozen=True, eq=False)
class _ScoredPrompts:
    """Prompts with their continuations; `ids` are the continuation's tokens, predicted from `last` on."""

    batch: Batch
    prompts: list[int]  # indices into all prompts
    last: list[int]  # position of each prompt's last token
    ids: Any
    scored: Bool[Tensor, "sequence place"]
    abstains: bool

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        starts: list[list[int]],
        continuations: list[list[int]],
        prompts: Sequence[int],
        abstains: bool,
    ) -> "_ScoredPrompts":
        lengths = (len(start) + len(after) for start, after in zip(starts, continuations, strict=True))
        longest = max(lengths) - 1
        places = max(map(len, continuations))
        ids = torch.zeros(len(starts), longest, dtype=torch.long)
        mask, target = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        predicted = torch.zeros(len(starts), places, dtype=torch.long)
        scored = torch.zeros_like(predicted, dtype=torch.bool)
        for index, (start, after) in enumerate(zip(starts, continuations, strict=True)):
            whole = [*start, *after[:-1]]
            ids[index, : len(whole)] = torch.tensor(whole)
            mask[index, : len(whole)] = 1
            target[index, len(start) - 1] = True
            predicted[index, : len(after)] = torch.tensor(after)
            scored[index, : len(after)] = True
        batch = Batch(ids, mask, target).to(model.device)
        last = [len(start) - 1 for start in starts]
        return cls(batch, list(prompts), last, predicted.to(model.device), scored.to(model.device), abstains)


@dataclass(frozen=True)
class StateIntervention:
    """Shared fields and methods of the interventions on states; each adds its `kind` and its `shift`.

    A base class, so that the settings are fields of each intervention: `intervention.steer.strengths=[1]`.
    """

    declaration: ClassVar[InterventionDeclaration] = OF_STATES
    kind: ClassVar[str]

    strengths: list[float] = Field(default_factory=list, min_length=1)
    prompted: StateEditSettings = Field(default_factory=StateEditSettings)

    def shift(self, ground: LayerStates, strength: float, generator: torch.Generator | None) -> StateEdit:
        """The treatment; with a generator, a control along random directions."""
        raise NotImplementedError(f"{type(self).__name__} has no method `shift`")

    def check(self, architecture: Architecture) -> None:
        """Refuse layers that the model lacks, too few controls, and strengths that are not positive."""
        self.prompted.check(architecture, self.strengths)

    def check_examples(self, examples: Examples) -> None:
        """Refuse data without the prompt groups."""
        self.prompted.check_examples(examples)

    def arms(self, architecture: Architecture) -> int:
        """Number of treatments and controls over all layers and strengths."""
        return (
            len(self.prompted.chosen_layers(architecture)) * len(self.strengths) * (1 + self.prompted.random)
        )

    def rows(self, setting: Setting, log: Log) -> list[Row]:
        """The effects of every arm."""
        return state_edit_rows(self.prompted, setting, log, self.kind, self.strengths, self.shift)


def state_edit_rows(
    prompted: StateEditSettings,
    setting: Setting,
    log: Log,
    kind: str,
    strengths: Sequence[float],
    shift: Any,
) -> list[Row]:
    """Rows of the trials of one kind of edit, made by `shift(states, strength, generator)`.

    Without a generator, `shift` gives the treatment; with one, a control along random directions, which is
    scaled to the treatment's norm.
    """
    at_end = prompted.at == "end" or (prompted.at == "auto" and setting.from_random)
    by_layer, evaluation = states_and_evaluation(prompted, setting, setting.end if at_end else setting.start)

    def trials() -> Iterator[Trial]:
        for states in by_layer:
            for strength in strengths:
                treatment = shift(states, strength, None)
                if not treatment.norm > 0:
                    raise ValueError(
                        f"{kind} at layer {states.layer} adds nothing, so no control can match it: choose"
                        " other layers or prompts"
                    )
                generator = torch.Generator().manual_seed(setting.seed)
                controls = []
                for draw in range(prompted.random):
                    control = shift(states, strength, generator)
                    control = control.scaled(treatment.norm / control.norm)
                    controls.append(Arm("random", control, {"shift norm": control.norm}, "shift norm", draw))
                place = {"layer": states.layer, "subspace": "residual"}
                treated = Arm(kind, treatment, {"shift norm": treatment.norm})
                yield Trial(place, f"{strength:g}", treated, controls)

    rows = list(measured(trials(), evaluation, setting.seed, log, keep=setting.keep))
    step = setting.last if at_end else 0
    unedited = arm_columns("unedited")
    base = [
        row(name, float(values.double().mean()), n=len(values), step=step, subspace="residual", **unedited)
        for name, values in evaluation.unedited.items()
        if name != "kl_from_unedited"
    ]
    return [*base, *({"step": step, **effect} for effect in with_q_values(rows))]

"""Edits of states instead of weights: what is added behind a layer or to the logits, and what that does."""

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
from weightgeom.estimators.hidden_states import Tail, check_layers, last_states
from weightgeom.geometry.divergences import divergences
from weightgeom.interfaces import Log, Setting
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import Architecture
from weightgeom.params import Params
from weightgeom.table import Row, arm_columns, row
from weightgeom.text.examples import Examples
from weightgeom.text.prompt_groups import check_groups, phrase_tokens
from weightgeom.text.tokens import Batch
from weightgeom.uncertainty.contrast import Contrast, equal_groups


@plain_dataclass(frozen=True, eq=False)
class Shift:
    """What is added for every prompt: to its state behind a layer, and to the logits of abstaining.

    The state is that at the prompt's last token. The logits are those of the first token of every abstention,
    and of each next one behind the tokens before it.
    """

    layer: int
    states: Float[Tensor, "prompt d"]
    logits: Float[Tensor, " prompt"]

    @property
    def norm(self) -> float:
        """The root mean square over prompts of what is added."""
        squares = self.states.double().square().sum(1) + self.logits.double().square()
        return float(squares.mean().sqrt())

    def scaled(self, factor: float) -> "Shift":
        """So many times as large."""
        return Shift(self.layer, factor * self.states, factor * self.logits)


@dataclass(frozen=True)
class Prompted:
    """On which prompts, and against how many controls, an edit of states is tried.

    `uncertain` is a group other than the first, by default the second. Half of the prompts are for
    directions, on the other half effects are measured. Quantities, each a mean over prompts:
        abstention: share of uncertain prompts that are answered by an abstention, in [0, 1].
        false_abstention: the same of factual prompts.
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
        """Refuse layers that the model does not have, controls that are too few, strengths that are none."""
        check_layers(self.layers, architecture)
        check_controls(self.random, self.level)
        if bad := [one for one in strengths if not 0 < one < float("inf")]:
            raise ValueError(f"strengths must be positive and finite, got {bad[0]}")

    def check_examples(self, examples: Examples) -> None:
        """Refuse data without groups, or without the one that is asked for."""
        check_groups(examples)
        factual, *others = examples.groups
        if self.uncertain is not None and self.uncertain not in others:
            raise ValueError(f"there is no uncertain group {self.uncertain!r}; there are {', '.join(others)}")
        if not any(question.answer for question in examples.groups[factual]):
            raise ValueError(
                f"no prompt of the group {factual!r} has an answer to be accurate about: give some"
            )

    def chosen(self, architecture: Architecture) -> list[int]:
        """The layers."""
        return list(range(architecture.n_layers)) if self.layers is None else sorted(set(self.layers))


@plain_dataclass(frozen=True, eq=False)
class Ground:
    """What an edit of states is made of at one layer: states for directions, and those that are edited."""

    layer: int
    factual: Float[Tensor, "one d"]
    uncertain: Float[Tensor, "other d"]
    edited: Float[Tensor, "prompt d"]

    @property
    def boundary(self) -> Float[Tensor, " d"]:
        """b, of the training halves."""
        difference = self.uncertain.mean(0) - self.factual.mean(0)
        return difference / difference.norm()

    @property
    def norm(self) -> float:
        """The root mean square norm of a state."""
        return float(self.edited.square().sum(1).mean().sqrt())


def grounds_and_evaluation(
    asked: Prompted, setting: Setting, params: Params
) -> tuple[list[Ground], "Prompting"]:
    """The states that an edit starts from, layer by layer, and what measures it on the other half."""
    asked.check_examples(setting.examples)
    names = list(setting.examples.groups)
    pair = [names[0], asked.uncertain or names[1]]
    groups = equal_groups({name: setting.examples.groups[name] for name in pair}, asked.prompts, setting.seed)
    size = len(groups[pair[0]])
    half = Contrast.of(size, 0, 0).train.shape[2]
    model = setting.model
    network = model.with_weights(params).requires_grad_(False).eval()
    layers = asked.chosen(model.architecture)
    states = {
        name: last_states(model, network, [one.prompt for one in group], layers)
        for name, group in groups.items()
    }
    one, other = (states[name] for name in pair)
    grounds = [
        Ground(
            layer, one[layer][:half], other[layer][:half], torch.cat([one[layer][half:], other[layer][half:]])
        )
        for layer in layers
    ]
    tested = [groups[name][half:] for name in pair]
    return grounds, Prompting(model, network, tested, setting.examples.abstentions)


class Prompting:
    """Measures edits of states on factual prompts and as many uncertain ones, in this order.

    Every prompt is followed by an abstention, or by its answer, but for the last token: what counts is
    whether each token is the most likely one where it is predicted.
    """

    def __init__(self, model: LanguageModel, network: Any, tested: list[Any], phrases: Sequence[str]) -> None:
        self.model, self.network = model, network
        factual, uncertain = tested
        self.factual = len(factual)
        questions = [*factual, *uncertain]
        starts = [list(model.tokenizer(one.prompt)["input_ids"]) for one in questions]
        self.phrases = phrase_tokens(phrases, model.tokenizer)
        self.first = sorted({ids[0] for ids in self.phrases})
        self.parts = [
            _Part.of(model, starts, [ids] * len(starts), range(len(starts)), True) for ids in self.phrases
        ]
        answered = [index for index, one in enumerate(factual) if one.answer]
        answers = [
            list(model.tokenizer(factual[index].answer, add_special_tokens=False)["input_ids"])
            for index in answered
        ]
        self.parts.append(_Part.of(model, [starts[i] for i in answered], answers, answered, False))
        self._tails: dict[tuple[int, int], Tail] = {}
        nothing = Shift(
            model.architecture.n_layers - 1,
            torch.zeros(len(starts), model.architecture.d_model),
            torch.zeros(len(starts)),
        )
        self._base: Float[Tensor, "prompt vocabulary"] | None = None
        self.unedited, self._base = self._samples(nothing)

    def changed_by(self, edit: Shift) -> Samples:
        """What the edit changes, prompt by prompt; KL, being a difference already, as it is."""
        samples, _ = self._samples(edit)
        kept = "kl_from_unedited"
        return {name: one if name == kept else one - self.unedited[name] for name, one in samples.items()}

    @torch.no_grad()
    def _samples(self, edit: Shift) -> tuple[Samples, Float[Tensor, "any vocabulary"]]:
        right, start = [], torch.zeros(0)
        for number, part in enumerate(self.parts):
            key = edit.layer, number
            if key not in self._tails:  # edits come layer by layer: no more than one layer's are kept
                self._tails = {one: tail for one, tail in self._tails.items() if one[0] == edit.layer}
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
class _Part:
    """Prompts with what follows each of them; `ids` are the tokens that are predicted from `last` on."""

    batch: Batch
    prompts: list[int]  # of all prompts
    last: list[int]  # position of each prompt's last token
    ids: Any
    scored: Bool[Tensor, "sequence place"]
    abstains: bool

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        starts: list[list[int]],
        followed: list[list[int]],
        prompts: Sequence[int],
        abstains: bool,
    ) -> "_Part":
        longest = max(len(a) + len(b) - 1 for a, b in zip(starts, followed, strict=True))
        places = max(map(len, followed))
        ids = torch.zeros(len(starts), longest, dtype=torch.long)
        mask, target = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        predicted = torch.zeros(len(starts), places, dtype=torch.long)
        scored = torch.zeros_like(predicted, dtype=torch.bool)
        for index, (start, after) in enumerate(zip(starts, followed, strict=True)):
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
class EditOfStates:
    """The fields and methods that interventions on states share: each adds its `kind` and its `shift`.

    A base class, as their settings must stay fields of theirs: `intervention.steer.strengths=[1]`.
    """

    headline: ClassVar[str] = "abstention_change"
    kind: ClassVar[str]

    strengths: list[float] = Field(default_factory=list, min_length=1)
    prompted: Prompted = Field(default_factory=Prompted)

    def shift(self, ground: Ground, strength: float, generator: torch.Generator | None) -> Shift:
        """The treatment; with a generator a control, along random directions."""
        raise NotImplementedError(f"{type(self).__name__} has no method `shift`")

    def check(self, architecture: Architecture) -> None:
        """Refuse what the model does not have, and controls that are too few."""
        self.prompted.check(architecture, self.strengths)

    def check_examples(self, examples: Examples) -> None:
        """Refuse data without the groups."""
        self.prompted.check_examples(examples)

    def arms(self, architecture: Architecture) -> int:
        """Treatments and controls, over layers and strengths."""
        return len(self.prompted.chosen(architecture)) * len(self.strengths) * (1 + self.prompted.random)

    def rows(self, setting: Setting, log: Log) -> list[Row]:
        """What every arm did."""
        return tried(self.prompted, setting, log, self.kind, self.strengths, self.shift)


def tried(
    asked: Prompted,
    setting: Setting,
    log: Log,
    kind: str,
    strengths: Sequence[float],
    shift: Any,
) -> list[Row]:
    """Rows of the trials of a kind of edit: `shift(ground, strength, generator)` makes one.

    Without a generator it is the treatment; with one a control, along random directions, which is then
    scaled to the treatment's norm.
    """
    at_end = asked.at == "end" or (asked.at == "auto" and setting.from_random)
    grounds, evaluation = grounds_and_evaluation(asked, setting, setting.end if at_end else setting.start)

    def trials() -> Iterator[Trial]:
        for ground in grounds:
            for strength in strengths:
                treatment = shift(ground, strength, None)
                if not treatment.norm > 0:
                    raise ValueError(f"{kind} at layer {ground.layer} adds nothing: no control can match it")
                generator = torch.Generator().manual_seed(setting.seed)
                controls = []
                for draw in range(asked.random):
                    control = shift(ground, strength, generator)
                    control = control.scaled(treatment.norm / control.norm)
                    controls.append(Arm("random", control, {"shift norm": control.norm}, "shift norm", draw))
                place = {"layer": ground.layer, "subspace": "residual"}
                treated = Arm(kind, treatment, {"shift norm": treatment.norm})
                yield Trial(place, f"{strength:g}", treated, controls)

    rows = list(measured(trials(), evaluation, setting.seed, log))
    step = setting.last if at_end else 0
    unedited = arm_columns("unedited")
    base = [
        row(name, float(values.double().mean()), n=len(values), step=step, subspace="residual", **unedited)
        for name, values in evaluation.unedited.items()
        if name != "kl_from_unedited"
    ]
    return [*base, *({"step": step, **one} for one in with_q_values(rows))]

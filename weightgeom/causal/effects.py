"""The effects of an edit of the weights: losses, preferences and knowledge, against the unedited model."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass as plain_dataclass
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from weightgeom.causal.edits import Edit
from weightgeom.compat.torch_internals import exchange_parameter
from weightgeom.estimators.lm_head import logits_of
from weightgeom.geometry.divergences import divergences
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import ATTENTION, MIXER, MLP, module_path
from weightgeom.params import Params
from weightgeom.text.examples import Examples
from weightgeom.text.tokens import Batch, answers, packed, responses

UNITS = {
    "heldout_ce": "nats/token",
    "kl_from_unedited": "nats/token",
    "preference_margin": "nats/pair",
    "preference_accuracy": "1",
    "fact_accuracy": "1",
}
STATE_UNITS = {"abstention": "1", "false_abstention": "1", "factual_accuracy": "1"}  # of edits of states
TOKENS, PROMPTS = 4096, 128  # of a batch of text, and of one of pairs or questions
DIFFERENTIABLE = ("heldout_ce", "preference_margin")  # those with a first-order effect
Samples = dict[str, Float[Tensor, " prompt"]]
"""Each quantity's value of every prompt: a sequence of text, a pair, or a question."""


@dataclass(frozen=True)
class Effects:
    """On how much each effect is measured.

    Quantities, each a mean over prompts:
        heldout_ce: -log p(token | before) on held-out text, nats per token, >= 0.
        kl_from_unedited: KL(unedited || edited) of the predictions there, nats per token, >= 0.
        preference_margin: log p(chosen | prompt) - log p(rejected | prompt) of held-out pairs, nats.
        preference_accuracy: share of pairs with a positive margin, in [0, 1].
        fact_accuracy: share of questions whose answer is the most likely one, token by token, in [0, 1].
    """

    tokens: int = Field(default=2048, ge=2)  # of held-out text
    length: int = Field(default=96, ge=2)  # tokens a sequence of text
    pairs: int = Field(default=96, ge=0)
    pair_length: int = Field(default=256, ge=2)  # tokens of prompt + response
    questions: int = Field(default=128, ge=0)


@plain_dataclass(frozen=True, eq=False)
class _Scored:
    """A batch, its kind, and the unedited model's logits at its targets.

    `tokens` are the predicted tokens of a sequence of text, in the mean over all of the text.
    """

    batch: Batch
    kind: str  # text, chosen, rejected or question
    logits: Float[Tensor, "target vocabulary"]
    normaliser: Float[Tensor, " target"]
    tokens: float

    @property
    def rows(self) -> "tuple[Tensor, Tensor]":
        """Of every target, the sequence and the position before it, where it is predicted."""
        return self.batch.target[:, 1:].nonzero(as_tuple=True)  # pyright: ignore[reportReturnType]


class Evaluation:
    """Measures edits of one model; only the modules behind the first edited matrix run again.

    The layers before it are passed over, and so are the attention and the mixer of its own layer unless they
    are edited, and the MLP if only the attention is and the two are parallel. What they put out is kept from
    one call to the next, so measure edits layer by layer. The logits of the unedited model at all targets are
    held, in the dtype of the weights.
    """

    def __init__(self, model: LanguageModel, params: Params, examples: Examples, effects: Effects) -> None:
        dtype = torch.promote_types(params[model.architecture.embed].dtype, torch.float32)
        self.architecture = model.architecture
        self.network = model.with_weights(params, dtype).requires_grad_(False).eval()
        self.params: Params = {name: weight.detach() for name, weight in self.network.named_parameters()}
        self.device = model.device
        self._places = _places(self.network)
        self._kept: dict[str, list[Any]] = {}  # by module, what it puts out for every batch
        batches = list(_batches(model, examples, effects))
        texts = [batch.target[:, 1:].sum(1) for batch, kind in batches if kind == "text"]
        tokens = float(torch.cat(texts).double().mean()) if texts else 1.0
        self.parts = [self._scored(batch.to(model.device), kind, tokens) for batch, kind in batches]
        self.unedited = self.samples(self.params)

    def _scored(self, batch: Batch, kind: str, tokens: float) -> _Scored:
        with torch.no_grad():
            logits = logits_of(self.network, self._hidden(batch)[batch.target[:, 1:]])
        return _Scored(batch, kind, logits, logits.logsumexp(-1), tokens)

    def changed_by(self, edit: Edit) -> Samples:
        """The changes that an edit of the weights makes, prompt by prompt."""
        return self.change(edit.applied(self.params))

    def change(self, edited: Params) -> Samples:
        """The changes that the edited weights make, prompt by prompt; KL, a difference already, as it is."""
        samples = self.samples(edited)
        kept = "kl_from_unedited"
        return {
            name: value if name == kept else value - self.unedited[name] for name, value in samples.items()
        }

    @torch.no_grad()
    def samples(self, edited: Params) -> Samples:
        """Every quantity of the edited model, prompt by prompt; weights that are no others are shared."""
        changed = {name: weight for name, weight in edited.items() if weight is not self.params[name]}
        parts: dict[str, list[Tensor]] = {}
        with self._passing_over(self._unchanged(changed)) as at:
            for at[0], part in enumerate(self.parts):
                with _replaced(self._places, changed):
                    hidden = self._hidden(part.batch)[part.batch.target[:, 1:]]
                    logits = logits_of(self.network, hidden)
                for name, values in _measured(part, logits):
                    parts.setdefault(name, []).append(values)
        return dict(_quantities({name: torch.cat(values) for name, values in parts.items()}))

    def gradients(self, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """G = E[dL/dy aᵀ] of parameters as stored: the gradient of the mean of each L of `DIFFERENTIABLE`."""
        leaves = {name: self.params[name].clone().requires_grad_() for name in names}
        counts = dict.fromkeys(DIFFERENTIABLE, 0)
        gradients = {
            name: {leaf: torch.zeros_like(weight) for leaf, weight in leaves.items()}
            for name in DIFFERENTIABLE
        }
        for part in self.parts:
            if part.kind == "question":
                continue
            name = "heldout_ce" if part.kind == "text" else "preference_margin"
            sign = -1.0 if part.kind in ("text", "rejected") else 1.0
            with _replaced(self._places, leaves):
                hidden = self._hidden(part.batch)[part.batch.target[:, 1:]]
                logits = logits_of(self.network, hidden)
            log_probs = _picked(part, logits) - logits.logsumexp(-1)
            loss = sign * _by_prompt(part, log_probs).sum()
            for leaf, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
                gradients[name][leaf] += gradient
            if part.kind != "rejected":
                counts[name] += len(part.batch.input_ids)
        return {
            name: {leaf: total / counts[name] for leaf, total in gradients[name].items()}
            for name in DIFFERENTIABLE
            if counts[name]
        }

    def _hidden(self, batch: Batch) -> Float[Tensor, "sequence predicting d_model"]:
        """The last hidden state at every position that predicts one."""
        return self.network.base_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.positions(),
            use_cache=False,
        ).last_hidden_state[:, :-1]

    def _unchanged(self, changed: Params) -> dict[str, str]:
        """Modules that need not run, each with the one whose output in the unedited model it has."""
        matrices = [matrix for matrix in self.architecture.matrices if matrix.parameter in changed]
        if not matrices or {matrix.parameter for matrix in matrices} != set(changed):
            return {}
        first = min(matrix.layer for matrix in matrices)
        kinds = {matrix.kind for matrix in matrices if matrix.layer == first}
        layers = [module_path(self.architecture, layer) for layer in range(first)]
        unchanged = dict.fromkeys(layers, layers[-1]) if layers else {}
        for part in (ATTENTION, MIXER, MLP):
            path = module_path(self.architecture, first, part)
            if path and kinds.isdisjoint(part) and (part != MLP or self.architecture.parallel):
                unchanged[path] = path
        return unchanged

    @contextmanager
    def _passing_over(self, unchanged: Mapping[str, str]) -> Iterator[list[int]]:
        """Context in which these modules do not run; it yields a list whose entry is the batch's number."""
        sources = set(unchanged.values())
        if not sources <= self._kept.keys():
            self._kept = self._outputs(sources)
        at = [0]
        modules = {self.network.get_submodule(path): source for path, source in unchanged.items()}
        for module, source in modules.items():
            module.forward = lambda *_, outputs=self._kept[source], **named: _copied(outputs[at[0]])
        try:
            yield at
        finally:
            for module in modules:
                del module.forward  # which uncovers that of its class

    @torch.no_grad()
    def _outputs(self, paths: Collection[str]) -> dict[str, list[Any]]:
        """The outputs of modules of the unedited model, for every batch."""
        outputs: dict[str, list[Any]] = {path: [] for path in paths}

        def hook(path: str) -> Callable[..., None]:
            return lambda module, given, output: outputs[path].append(_copied(output))

        hooks = [self.network.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
        try:
            for part in self.parts:
                self._hidden(part.batch)
        finally:
            for handle in hooks:
                handle.remove()
        return outputs


def _copied(output: Any) -> Any:
    """A copy of a module's output: Falcon adds the attention's output to the MLP's in place."""
    parts = output if isinstance(output, tuple) else (output,)
    copies = tuple(part.clone() if isinstance(part, Tensor) else part for part in parts)
    return copies if isinstance(output, tuple) else copies[0]


def _places(network: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """The modules that have each parameter, and its name there: two where the unembedding is tied."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for key, parameter in module.named_parameters(recurse=False):
            places.setdefault(names[parameter], []).append((module, key))
    return places


@contextmanager
def _replaced(places: Mapping[str, list[tuple[nn.Module, str]]], changed: Params) -> Iterator[None]:
    """Within it the modules have these parameters; the ones that they had are put back untouched."""
    all_places = [(module, key, weight) for name, weight in changed.items() for module, key in places[name]]
    before = [exchange_parameter(module, key, weight) for module, key, weight in all_places]
    try:
        yield
    finally:
        for (module, key, _), weight in zip(all_places, before, strict=True):
            exchange_parameter(module, key, weight)


def _batches(model: LanguageModel, examples: Examples, effects: Effects) -> Iterator[tuple[Batch, str]]:
    """Few and large batches, since every arm pays the fixed cost of each call."""
    size = max(1, TOKENS // effects.length)
    for batch in packed(examples.heldout, model.tokenizer, effects.length, effects.tokens, size):
        yield batch, "text"
    pairs = examples.heldout_pairs[: effects.pairs]
    for chosen, rejected in responses(pairs, model.tokenizer, effects.pair_length, PROMPTS):
        yield chosen, "chosen"
        yield rejected, "rejected"
    for batch in answers(examples.questions[: effects.questions], model.tokenizer, PROMPTS):
        yield batch, "question"


def _measured(part: _Scored, logits: Float[Tensor, "target vocabulary"]) -> Iterator[tuple[str, Tensor]]:
    if part.kind == "question":
        ids = part.batch.input_ids[:, 1:][part.batch.target[:, 1:]]
        right = (logits.argmax(-1) == ids).to(logits)
        answered = part.batch.target[:, 1:].sum(1)
        yield "question", (_by_prompt(part, right) == answered).to(logits)
        return
    picked = _picked(part, logits)
    if part.kind == "text":
        divergence, normaliser = divergences(part.logits, part.normaliser, logits)
        yield "kl", _by_prompt(part, divergence)
        yield "text", -_by_prompt(part, picked - normaliser)
    else:
        yield part.kind, _by_prompt(part, picked - logits.logsumexp(-1))


def _quantities(measured: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    if "text" in measured:
        yield "heldout_ce", measured["text"]
        yield "kl_from_unedited", measured["kl"]
    if "chosen" in measured:
        margin = measured["chosen"] - measured["rejected"]
        yield "preference_margin", margin
        yield "preference_accuracy", (margin > 0).to(margin)
    if "question" in measured:
        yield "fact_accuracy", measured["question"]


def _picked(part: _Scored, logits: Float[Tensor, "target vocabulary"]) -> Float[Tensor, " target"]:
    ids = part.batch.input_ids[:, 1:][part.batch.target[:, 1:]]
    return logits.gather(1, ids[:, None])[:, 0]


def _by_prompt(part: _Scored, values: Float[Tensor, " target"]) -> Float[Tensor, " sequence"]:
    """The sum of the targets' values in every sequence; of text, over the mean number of targets.

    So the mean over sequences of text is the mean over tokens, however long the last one is.
    """
    sequences, _ = part.rows
    total = values.new_zeros(len(part.batch.input_ids)).index_add(0, sequences, values)
    return total / part.tokens if part.kind == "text" else total

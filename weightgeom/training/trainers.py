"""TRL's trainers on a data set's documents, responses or pairs."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from weightgeom.interfaces import Scored
from weightgeom.text.conversation import render
from weightgeom.text.examples import Examples
from weightgeom.text.tokens import tokenize

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
Part = Literal["text", "chosen"]
SIDES = ("chosen", "rejected")


def part(on: Literal["auto", "text", "chosen"], examples: Examples) -> Part:
    """The training part of the data; `auto` is the text if there is any, else the chosen responses."""
    if on != "auto":
        return on
    return "chosen" if examples.pairs and not examples.text else "text"


def check_part(objective: str, on: Literal["auto", "text", "chosen"], examples: Examples) -> None:
    """Raise ValueError if the data lack the training part."""
    trained = part(on, examples)
    if not (examples.pairs if trained == "chosen" else examples.text):
        needed = "preference pairs" if trained == "chosen" else "text"
        raise ValueError(f"objective={objective} on {trained} needs {needed}, but {examples.name} has none")


def check_pairs(objective: str, examples: Examples, otherwise: str = "") -> None:
    """Raise ValueError if the data have no pairs; `otherwise` is an alternative to other data."""
    if not examples.pairs:
        raise ValueError(
            f"objective={objective} needs preference pairs, but {examples.name} has none:"
            f" use data=preferences or data=world{otherwise}"
        )


def supervised_trainer(
    kind: Callable[..., Any],
    on: Part,
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: Examples,
    arguments: Mapping[str, Any],
) -> Any:
    """An `SFTTrainer`, or the subclass `kind`, on packed documents or on chosen responses; logs truncation.

    `arguments` are those of `SFTConfig`, and a `peft_config` if an adapter is trained.
    """
    from trl import SFTConfig

    length = arguments["max_length"]
    if on == "text":
        packing = {"packing": True, "packing_strategy": "wrapped"}
        dataset = _training_dataset({"text": list(examples.text)})
        trainer = _build(kind, SFTConfig, dataset, network, tokenizer, {**arguments, **packing})
        log.info(
            "%d documents packed end to end into %d sequences of %d tokens, none truncated",
            *(len(examples.text), len(trainer.train_dataset), length),
        )
        return trainer
    tokens = [tokenize(pair, tokenizer)[:2] for pair in examples.pairs]
    kept = [pair for pair in tokens if len(pair[0]) < length]
    _log_cut(
        "chosen responses", len(tokens), [len(prompt) + len(response) for prompt, response in kept], length
    )
    dataset = _training_dataset({
        "input_ids": [prompt + response for prompt, response in kept],
        "completion_mask": [[0] * len(prompt) + [1] * len(response) for prompt, response in kept],
    })  # fmt: skip
    return _build(kind, SFTConfig, dataset, network, tokenizer, {**arguments, "completion_only_loss": True})


def preference_trainer(
    kind: Callable[..., Any],
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: Examples,
    arguments: Mapping[str, Any],
) -> Any:
    """A `DPOTrainer`, or the subclass `kind`, whose reference is a copy of `network`; logs truncation.

    `arguments` are those of `DPOConfig`, and a `peft_config` if an adapter is trained: the reference is then
    `network` with the adapter disabled, without a copy.
    """
    from trl import DPOConfig

    names = ("prompt", "chosen", "rejected")
    reference = _reference_model(network, arguments)
    if arguments.get("disable_dropout", True):
        _disable_functional_dropout(network)
    rendered = [render(pair, tokenizer) for pair in examples.pairs]
    dataset = _training_dataset({name: [getattr(pair, name) for pair in rendered] for name in names})
    trainer = _build(kind, DPOConfig, dataset, network, tokenizer, arguments, ref_model=reference)
    columns = ([len(ids) for ids in trainer.train_dataset[f"{name}_ids"]] for name in names)
    lengths = [prompt + max(responses) for prompt, *responses in zip(*columns, strict=True)]
    _log_cut("pairs", len(dataset), lengths, arguments["max_length"])
    return trainer


def unpaired_trainer(
    kind: Callable[..., Any],
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: Examples,
    arguments: Mapping[str, Any],
) -> Any:
    """A `KTOTrainer` on the single responses of the pairs, the chosen ones desirable; logs truncation.

    `arguments` are those of `KTOConfig`, and a `peft_config`; this and the reference are as in
    `preference_trainer`.
    """
    from trl import KTOConfig

    if (size := arguments["per_device_train_batch_size"]) < 2:
        raise ValueError(
            "training.batch_size must be at least 2 for objective=kto, which estimates a KL divergence from"
            f" the other responses of a batch, got {size}"
        )
    reference = _reference_model(network, arguments)
    if arguments.get("disable_dropout", True):
        _disable_functional_dropout(network)
    rendered = [render(pair, tokenizer) for pair in examples.pairs]
    dataset = _training_dataset({
        "prompt": [pair.prompt for pair in rendered] * 2,
        "completion": [pair.chosen for pair in rendered] + [pair.rejected for pair in rendered],
        "label": [True] * len(rendered) + [False] * len(rendered),
    })  # fmt: skip
    # TRL keeps this order, and pairs each example of a batch with the response before it for the KL.
    shuffled = dataset.shuffle(seed=arguments["seed"])
    trainer = _build(kind, KTOConfig, shuffled, network, tokenizer, arguments, ref_model=reference)
    columns = (trainer.train_dataset[f"{name}_ids"] for name in ("prompt", "completion"))
    lengths = [len(prompt) + len(response) for prompt, response in zip(*columns, strict=True)]
    _log_cut("responses", len(dataset), lengths, arguments["max_length"])
    return trainer


def with_sharpness(trainer: Any, scored: Callable[[Mapping[str, Tensor]], Scored]) -> Any:
    """The trainer of a loss of log-probabilities, mutated to log its sharpness."""
    from weightgeom.training.sharpness import Sharpness

    trainer.add_callback(Sharpness(trainer, scored))
    return trainer


def own_loss(trainer: Any, inputs: dict[str, Any], **options: Tensor) -> Tensor:
    """The trainer's own loss of a batch: a mean, unless the `options` change its normalisation."""
    loss = trainer.compute_loss(trainer.model, inputs, **options)
    assert isinstance(loss, Tensor)
    return loss


def _training_dataset(columns: Mapping[str, list[Any]]) -> "Dataset":
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict(dict(columns))


def _build(
    kind: Callable[..., Any],
    config: Callable[..., Any],
    dataset: "Dataset",
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    arguments: Mapping[str, Any],
    **more: Any,
) -> Any:
    """A TRL trainer, whose config takes all arguments except the adapter's."""
    settings = dict(arguments)
    adapter = settings.pop("peft_config", None)
    return kind(
        model=network,
        args=config(**settings),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=adapter,
        **more,
    )


def _log_cut(kind: str, number: int, lengths: Sequence[int], limit: int) -> None:
    """Log the number of examples dropped and truncated; raise ValueError if none is left.

    `lengths` are the lengths of the remaining examples before truncation to `limit` tokens.
    """
    if not lengths:
        raise ValueError(f"every prompt is {limit} tokens or longer: raise training.max_length")
    log.info(
        "%d %s: %d dropped (prompt of %d tokens or more), %d truncated to %d tokens",
        *(number, kind, number - len(lengths), limit, sum(length > limit for length in lengths), limit),
    )


def _disable_functional_dropout(network: "PreTrainedModel") -> None:
    """Set dropout rates held as numbers to 0, which TRL's `disable_dropout` misses; mutates `network`."""
    for module in network.modules():
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _reference_model(network: "PreTrainedModel", arguments: Mapping[str, Any]) -> "PreTrainedModel | None":
    """A copy of `network`; None with an adapter, which TRL disables to compute the reference."""
    adapter = arguments.get("peft_config")
    if adapter is None:
        # Without a reference, TRL would load one again by name and without the revision.
        reference = type(network)(network.config).to(network.device, network.dtype)  # pyright: ignore[reportArgumentType]
        reference.load_state_dict(network.state_dict())
        return reference.eval()
    if adapter.lora_dropout and arguments.get("disable_dropout", True):
        raise ValueError(
            f"training.lora.dropout is {adapter.lora_dropout:g}, but TRL trains on preferences without"
            " dropout: set training.lora.dropout=0"
        )
    return None


def chosen_and_rejected(inputs: Mapping[str, Tensor], pad: int = 0) -> Scored:
    """A batch of TRL's `chosen_input_ids` and `rejected_input_ids` as such trainers read it: one term a pair.

    As in TRL's CPO and ORPO, all chosen sequences come first, then the rejected ones, padded on the right
    with `pad` to one length; the tokens with a label are the targets.
    """
    length = max(inputs[f"{side}_input_ids"].shape[1] for side in SIDES)

    def joined(name: str, value: int) -> Tensor:
        sides = [inputs[f"{side}_{name}"] for side in SIDES]
        padded = [functional.pad(side, (0, length - side.shape[1]), value=value) for side in sides]
        return torch.cat(padded)

    pairs = len(inputs["chosen_input_ids"])
    return Scored(
        joined("labels", -100) != -100,
        [*range(pairs), *range(pairs)],
        [1] * pairs,
        joined("input_ids", pad),
        joined("attention_mask", 0),
    )

"""TRL's trainers on a data set's documents, responses or pairs."""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from weightgeom.interfaces import Scored
from weightgeom.models.language_model import name_body
from weightgeom.text.conversation import for_trl
from weightgeom.text.examples import Examples
from weightgeom.text.tokens import tokenized, tokenized_responses
from weightgeom.training.ranks import from_first, of_all, processes

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
Part = Literal["text", "chosen"]
SIDES = ("chosen", "rejected")
STEP = 32  # tokens: the lengths that a warning names are multiples of it


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
        dataset = training_dataset({"text": list(examples.text)})
        trainer = _build(kind, SFTConfig, dataset, network, tokenizer, {**arguments, **packing})
        log.info(
            "%d documents packed end to end into %d sequences of %d tokens, none truncated",
            *(len(examples.text), len(trainer.train_dataset), length),
        )
        return trainer
    tokens = [(ids, prompt) for ids, prompt, _, _ in tokenized_responses(examples.pairs, tokenizer)]
    _report_cut("chosen responses", [(prompt, len(ids)) for ids, prompt in tokens], length, network)
    kept = [(ids, prompt) for ids, prompt in tokens if prompt < length]
    dataset = training_dataset({
        "input_ids": [ids for ids, _ in kept],
        "completion_mask": [[0] * prompt + [1] * (len(ids) - prompt) for ids, prompt in kept],
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
    `network` with the adapter disabled, without a copy. With `precompute_ref_log_probs` the copy, where TRL
    needs one, is dropped again; a frozen `network` has its own tensors for a reference.
    """
    from trl import DPOConfig

    names = ("prompt", "chosen", "rejected")
    lengths = [
        (len(prompt), len(prompt) + max(len(chosen), len(rejected)))
        for prompt, chosen, rejected in tokenized(examples.pairs, tokenizer)
    ]
    _report_cut("pairs", lengths, arguments["max_length"], network)
    frozen = not any(parameter.requires_grad for parameter in network.parameters())
    precomputed = bool(arguments.get("precompute_ref_log_probs")) and not frozen
    # TRL shards the network later than it computes the reference, which it shards at once.
    reference = None if precomputed and "fsdp" not in arguments else _reference_model(network, arguments)
    if arguments.get("disable_dropout", True):
        _disable_functional_dropout(network)
    pairs = for_trl(examples.pairs, tokenizer)
    dataset = training_dataset({name: [getattr(pair, name) for pair in pairs] for name in names})
    if not precomputed:
        arguments = {**arguments, "precompute_ref_log_probs": False}
        return _build(kind, DPOConfig, dataset, network, tokenizer, arguments, ref_model=reference)
    with _on_disk(dataset, Path(arguments["output_dir"])) as shared:
        trainer = _build(kind, DPOConfig, shared, network, tokenizer, arguments, ref_model=reference)
    trainer.ref_model = None
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
    lengths = [
        (prompt, len(ids))
        for chosen, start, rejected, other in tokenized_responses(examples.pairs, tokenizer)
        for ids, prompt in ((chosen, start), (rejected, other))
    ]
    _report_cut("responses", lengths, arguments["max_length"], network)
    reference = _reference_model(network, arguments)
    if arguments.get("disable_dropout", True):
        _disable_functional_dropout(network)
    pairs = for_trl(examples.pairs, tokenizer)
    dataset = training_dataset({
        "prompt": [pair.prompt for pair in pairs] * 2,
        "completion": [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs],
        "label": [True] * len(pairs) + [False] * len(pairs),
    })  # fmt: skip
    # TRL keeps this order, and pairs each example of a batch with the response before it for the KL.
    shuffled = dataset.shuffle(seed=arguments["seed"])
    return _build(kind, KTOConfig, shuffled, network, tokenizer, arguments, ref_model=reference)


def with_sharpness(
    trainer: Any, scored: Callable[[Mapping[str, Tensor]], Scored], contrasted: float | None = None
) -> Any:
    """The trainer of a loss of log-probabilities, mutated to log its sharpness.

    `contrasted` is the number of responses that each is contrasted with: 1 for pairs, NaN where the loss has
    no such number, None for a loss that contrasts tokens.
    """
    from weightgeom.training.sharpness import Sharpness

    trainer.add_callback(Sharpness(trainer, scored, contrasted=contrasted))
    return trainer


def own_loss(trainer: Any, inputs: dict[str, Any], **options: Tensor) -> Tensor:
    """The trainer's own loss of a batch: a mean, unless the `options` change its normalisation."""
    loss = trainer.compute_loss(trainer.model, inputs, **options)
    assert isinstance(loss, Tensor)
    return loss


def training_dataset(columns: Mapping[str, list[Any]]) -> "Dataset":
    """A data set of these columns, made without a progress bar."""
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict(dict(columns))


@contextmanager
def _on_disk(dataset: "Dataset", directory: Path) -> "Iterator[Dataset]":
    """A data set whose derivatives several processes of a training share as files while it is derived from.

    The files are deleted at the end; the processes that have them open keep them until they end.
    """
    import datasets

    if processes() == 1:
        yield dataset
        return
    place = directory / ".reference"
    from_first(lambda: dataset.save_to_disk(place))
    yield datasets.load_from_disk(place)  # pyright: ignore[reportReturnType]
    of_all(None)  # wait for the others
    from_first(lambda: shutil.rmtree(place))


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
    given = network.config
    if getattr(given, "router_aux_loss_coef", 0.0) and getattr(given, "num_experts", None) is None:
        # Llama 4's forward has no such loss, and TRL would look for the number of its experts in vain.
        settings.setdefault("router_aux_loss_coef", 0.0)
    adapter = settings.pop("peft_config", None)
    return kind(
        model=network,
        args=config(**settings),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=adapter,
        **more,
    )


def _report_cut(
    kind: str, lengths: Sequence[tuple[int, int]], limit: int, network: "PreTrainedModel"
) -> None:
    """Log the number of examples dropped and truncated to `limit` tokens; a warning above a tenth of them.

    `lengths` are those of each prompt, and of the prompt with its longest response. The warning names the
    `max_length` that would leave nine tenths whole, as far as the network's positions allow.

    Raises:
        ValueError: if every example is dropped.
    """
    wanted = sorted(whole for _, whole in lengths)[ceil(0.9 * len(lengths)) - 1]
    wanted = STEP * ceil(wanted / STEP)
    context = getattr(network.config, "max_position_embeddings", None) or wanted
    wanted, kept = min(wanted, context), sum(whole <= min(wanted, context) for _, whole in lengths)
    dropped = sum(prompt >= limit for prompt, _ in lengths)
    truncated = sum(prompt < limit < whole for prompt, whole in lengths)
    how = f"training.max_length={wanted} leaves {kept} of {len(lengths)} {kind} whole"
    if dropped == len(lengths):
        raise ValueError(f"every prompt is {limit} tokens or longer: raise training.max_length ({how})")
    many = dropped + truncated > len(lengths) / 10 and wanted > limit
    log.log(
        logging.WARNING if many else logging.INFO,
        "%d %s: %d dropped (prompt of %d tokens or more), %d truncated to %d tokens%s",
        *(len(lengths), kind, dropped, limit, truncated, limit, f": {how}" if many else ""),
    )


def _disable_functional_dropout(network: "PreTrainedModel") -> None:
    """Set dropout rates held as numbers to 0, which TRL's `disable_dropout` misses; mutates `network`."""
    for module in network.modules():
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _reference_model(network: "PreTrainedModel", arguments: Mapping[str, Any]) -> "PreTrainedModel | None":
    """A copy of `network`; None with an adapter, which TRL disables to compute the reference.

    That of a frozen network has its tensors, as neither will change.
    """
    adapter = arguments.get("peft_config")
    if adapter is None and not any(parameter.requires_grad for parameter in network.parameters()):
        tensors = chain(network.parameters(), network.buffers())
        return deepcopy(network, {id(tensor): tensor for tensor in tensors}).eval()
    if adapter is None:
        # Without a reference, TRL would load one again by name and without the revision.
        reference = type(network)(network.config).to(network.device, network.dtype)  # pyright: ignore[reportArgumentType]
        reference.load_state_dict(network.state_dict())
        name_body(reference)
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

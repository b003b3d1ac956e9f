"""TRL's trainers on our examples: how responses and documents become their data sets."""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from weightgeom.text.conversation import render
from weightgeom.text.examples import Examples
from weightgeom.text.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
Part = Literal["text", "chosen"]


def part(on: Literal["auto", "text", "chosen"], examples: Examples) -> Part:
    """Which part of the data is trained on: `auto` is the text, where there is any."""
    if on != "auto":
        return on
    return "chosen" if examples.pairs and not examples.text else "text"


def supervised(
    kind: Callable[..., Any],
    on: Part,
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: Examples,
    arguments: Mapping[str, Any],
) -> Any:
    """An `SFTTrainer` or a kind of it, on documents, packed, or on chosen responses; logs what was cut.

    `arguments` are those of `SFTConfig`, and a `peft_config` where an adapter is trained.
    """
    import datasets
    from trl import SFTConfig

    datasets.disable_progress_bars()
    settings = dict(arguments)
    adapter, length = settings.pop("peft_config", None), settings["max_length"]
    if on == "text":
        dataset = datasets.Dataset.from_dict({"text": list(examples.text)})
        packing: dict[str, Any] = {"packing": True, "packing_strategy": "wrapped"}
    else:
        tokens = [tokenize(pair, tokenizer)[:2] for pair in examples.pairs]
        kept = [pair for pair in tokens if len(pair[0]) < length]
        if not kept:
            raise ValueError(f"every prompt is {length} tokens or longer: raise training.max_length")
        cut = sum(len(prompt) + len(response) > length for prompt, response in kept)
        log.info(
            "%d chosen responses: %d dropped (prompt of %d tokens or more), %d cut at %d tokens",
            *(len(tokens), len(tokens) - len(kept), length, cut, length),
        )
        dataset = datasets.Dataset.from_dict(
            {
                "input_ids": [prompt + response for prompt, response in kept],
                "completion_mask": [[0] * len(prompt) + [1] * len(response) for prompt, response in kept],
            }
        )
        packing = {"completion_only_loss": True}
    trainer = kind(
        model=network,
        args=SFTConfig(**settings, **packing),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    if on == "text":
        log.info(
            "%d documents packed end to end into %d sequences of %d tokens, none cut",
            *(len(examples.text), len(trainer.train_dataset), length),  # pyright: ignore[reportArgumentType]
        )
    return trainer


def preference(
    kind: Callable[..., Any],
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: Examples,
    arguments: Mapping[str, Any],
) -> Any:
    """A `DPOTrainer` or a kind of it, whose reference is a copy of `network` as it is; logs what was cut.

    `arguments` are those of `DPOConfig`, and a `peft_config` where an adapter is trained: the reference is
    then `network` with the adapter off, and nothing is copied.
    """
    import datasets
    from trl import DPOConfig

    datasets.disable_progress_bars()
    settings = dict(arguments)
    adapter = settings.pop("peft_config", None)
    reference = _reference(network, adapter, settings)
    rendered = [render(pair, tokenizer) for pair in examples.pairs]
    dataset = datasets.Dataset.from_dict(
        {name: [getattr(pair, name) for pair in rendered] for name in ("prompt", "chosen", "rejected")}
    )
    trainer = kind(
        model=network,
        ref_model=reference,
        args=DPOConfig(**settings),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    kept, length = trainer.train_dataset, arguments["max_length"]
    assert isinstance(kept, datasets.Dataset)
    if not len(kept):
        raise ValueError(f"every prompt is {length} tokens or longer: raise training.max_length")
    lengths = zip(
        *([len(ids) for ids in kept[f"{name}_ids"]] for name in ("prompt", "chosen", "rejected")),
        strict=True,
    )
    cut = sum(prompt + max(responses) > length for prompt, *responses in lengths)
    log.info(
        "%d pairs: %d dropped (prompt of %d tokens or more), %d cut at %d tokens",
        *(len(dataset), len(dataset) - len(kept), length, cut, length),
    )
    return trainer


def unpaired(
    kind: Callable[..., Any],
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: Examples,
    arguments: Mapping[str, Any],
) -> Any:
    """A `KTOTrainer` on the responses of the pairs one by one, the chosen desirable; logs what was cut.

    `arguments` are those of `KTOConfig`, and a `peft_config`, as for `preference`, as is the reference.
    """
    import datasets
    from trl import KTOConfig

    datasets.disable_progress_bars()
    settings = dict(arguments)
    adapter, length = settings.pop("peft_config", None), settings["max_length"]
    size = settings["per_device_train_batch_size"]
    if size < 2:
        raise ValueError(
            "objective=kto estimates a KL divergence by the other responses of a batch: training.batch_size"
            f" must be 2 or more, got {size}"
        )
    reference = _reference(network, adapter, settings)
    rendered = [render(pair, tokenizer) for pair in examples.pairs]
    dataset = datasets.Dataset.from_dict(
        {
            "prompt": [pair.prompt for pair in rendered] * 2,
            "completion": [pair.chosen for pair in rendered] + [pair.rejected for pair in rendered],
            "label": [True] * len(rendered) + [False] * len(rendered),
        }
    )
    trainer = kind(
        model=network,
        ref_model=reference,
        args=KTOConfig(**settings),
        # TRL takes the examples in this order, and of a batch each with the response before it.
        train_dataset=dataset.shuffle(seed=settings["seed"]),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    kept = trainer.train_dataset
    if not len(kept):
        raise ValueError(f"every prompt is {length} tokens or longer: raise training.max_length")
    cut = sum(
        len(prompt) + len(response) > length
        for prompt, response in zip(kept["prompt_ids"], kept["completion_ids"], strict=True)
    )
    log.info(
        "%d responses: %d dropped (prompt of %d tokens or more), %d cut at %d tokens",
        *(len(dataset), len(dataset) - len(kept), length, cut, length),
    )
    return trainer


def _reference(
    network: "PreTrainedModel", adapter: Any, settings: Mapping[str, Any]
) -> "PreTrainedModel | None":
    """A copy of `network`; None with an adapter, which TRL turns off to have the reference."""
    if adapter is None:
        # Rebuilt, not left to TRL: without a reference it loads one again by name and without revision.
        reference = type(network)(network.config).to(network.device, network.dtype)  # pyright: ignore[reportArgumentType]
        reference.load_state_dict(network.state_dict())
        return reference
    if adapter.lora_dropout and settings.get("disable_dropout", True):
        raise ValueError(
            f"training.lora.dropout is {adapter.lora_dropout:g}, and TRL trains on preferences without"
            " dropout: set it to 0"
        )
    return None

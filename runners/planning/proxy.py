"""A small network in proportion to a large one, with text to match, so that what it costs can be measured."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightgeom.text.conversation import CHAT_TEMPLATE, plain_text
from weightgeom.text.examples import Examples, Pair, Question

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

WIDTH, LAYERS = 512, 2  # of the largest proxy; a network no larger stands for itself
SMALLEST = 48  # entries of its vocabulary
DOCUMENTS, PAIRS = 256, 256  # of the real data that are looked at


@dataclass(frozen=True, eq=False)
class Proxy:
    """A config with fewer layers, and vocabulary in the same proportion, and all widths narrower alike.

    The network has `layers` times the proxy's layers and `width` times its widths: of what a pass costs for
    each token, and of the weights, `layers · width²` times as much; of activations, `layers · width` times;
    of the decompositions of d x d matrices `layers · width³` times.
    """

    config: "PreTrainedConfig"
    layers: float
    width: float


def proxy_of(
    config: "PreTrainedConfig", width: int = WIDTH, layers: int = LAYERS, vocabulary: int | None = None
) -> Proxy:
    """The proxy of a config, of its own class: the network itself where it is small.

    `width` is what it is to have at most, or a head; another `vocabulary` leaves the proportion.
    """
    heads, groups = config.num_attention_heads, _groups(config)
    small = config.hidden_size <= width and config.num_hidden_layers <= 2 * layers
    layers = config.num_hidden_layers if small else min(layers, config.num_hidden_layers)
    kept = max(1, round(groups * min(1.0, width / config.hidden_size)))
    part = kept / groups
    if groups == 1 and config.hidden_size > width:
        part = max(1, round(heads * width / config.hidden_size)) / heads
    share = layers / config.num_hidden_layers * part
    plain = config.to_dict()
    sizes: dict[str, Any] = {
        "hidden_size": round(config.hidden_size * part),
        "num_hidden_layers": layers,
        "num_attention_heads": round(heads * part),
        "vocab_size": vocabulary or max(SMALLEST, round(config.vocab_size * share)),
    }
    if plain.get("num_key_value_heads") is not None:
        sizes["num_key_value_heads"] = kept if groups > 1 else groups
    for name in ("intermediate_size", "n_inner", "moe_intermediate_size"):
        if plain.get(name) is not None:
            sizes[name] = max(1, round(plain[name] * part))
    # GPT-2 has names of its own for some of these.
    sizes = {config.attribute_map.get(name, name): value for name, value in sizes.items()}
    by_layer = {
        name: value[:layers]
        for name, value in plain.items()
        if isinstance(value, list) and len(value) == config.num_hidden_layers
    }
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1)
    made = type(config)(**{**plain, **by_layer, **sizes, **ends})
    return Proxy(made, config.num_hidden_layers / layers, config.hidden_size / made.hidden_size)


def _groups(config: "PreTrainedConfig") -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def standin_tokenizer() -> "PreTrainedTokenizerBase":
    """A tokenizer of `SMALLEST` entries: one token a word, of those that `standin` writes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", *(f"w{n}" for n in range(SMALLEST - 2))]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def lengths_by(tokenizer: "PreTrainedTokenizerBase | None") -> Callable[[str], int]:
    """The tokens of a text; without its tokenizer a quarter of its characters."""
    if tokenizer is None:
        return lambda text: max(1, len(text) // 4)
    return lambda text: max(1, len(tokenizer(text, add_special_tokens=False)["input_ids"]))  # pyright: ignore


def standin(examples: Examples, length: Callable[[str], int]) -> Examples:
    """Random words in examples of the same kinds, numbers (some hundreds at most) and numbers of tokens."""
    draw = random.Random("weightgeom stand-in")

    def written(text: Any) -> str:
        return "".join(f" w{draw.randrange(SMALLEST - 2)}" for _ in range(length(plain_text(text))))

    def pairs(some: Sequence[Pair]) -> list[Pair]:
        return [Pair(*map(written, (one.prompt, one.chosen, one.rejected))) for one in some[:PAIRS]]

    def questions(some: Sequence[Question]) -> list[Question]:
        return [Question(written(one.prompt), written(one.answer)) for one in some[:PAIRS]]

    def documents(some: Sequence[str]) -> list[str]:
        return [written(text[:20_000]) for text in some[:DOCUMENTS]]

    return replace(
        examples,
        text=documents(examples.text),
        heldout=documents(examples.heldout),
        pairs=pairs(examples.pairs),
        heldout_pairs=pairs(examples.heldout_pairs),
        questions=questions(examples.questions),
        groups={name: questions(some) for name, some in examples.groups.items()},
        abstentions=[written(one) for one in examples.abstentions],
    )


def assumed(name: str, number: int, length: int) -> Examples:
    """Examples that are not here yet: pairs and documents of `length` tokens each, the longest that fit."""
    one = "word" * length  # a quarter of its characters, which `lengths_by` counts
    heldout = max(2, number // 10)
    pair = Pair(one[: len(one) // 4], one[: 3 * len(one) // 4], one[: 3 * len(one) // 4])
    few = min(number, PAIRS)
    return Examples(
        name, [one] * few, [one] * min(few, heldout), [pair] * few, [pair] * min(few, heldout), ""
    )

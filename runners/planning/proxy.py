"""A small network in proportion to a large one, with matching text, on which costs can be measured."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightgeom.text.conversation import CHAT_TEMPLATE, plain_text
from weightgeom.text.examples import Examples, Pair, Question

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

WIDTH, LAYERS = 512, 2  # of the largest proxy; a smaller network is its own proxy
SMALLEST = 48  # entries of the smallest vocabulary
# By the names that configs have for them.
MLPS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "moe_intermediate_size")
WIDTHS = (*MLPS, "intermediate_size_mlp", "word_embed_proj_dim", "q_lora_rank", "kv_lora_rank")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
DOCUMENTS, PAIRS = 256, 256  # maximal numbers taken from the real data


@dataclass(frozen=True, eq=False)
class Proxy:
    """A config with fewer layers, all widths scaled alike, and the vocabulary in proportion.

    The network has `layers` times the proxy's layers and `width` times its widths. The cost of a pass per
    token and the size of the weights scale by `layers · width²`, activations by `layers · width`, and
    decompositions of d x d matrices by `layers · width³`.
    """

    config: "PreTrainedConfig"
    layers: float
    width: float


def proxy_of(
    config: "PreTrainedConfig", width: int = WIDTH, layers: int = LAYERS, vocabulary: int | None = None
) -> Proxy:
    """The proxy of a config, of the same class; a small network is its own proxy.

    The proxy is at most `width` wide, but has at least one head. `vocabulary` overrides the proportional
    size of the vocabulary.
    """
    heads, groups = config.num_attention_heads, _key_value_heads(config)
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
    for name in KEY_VALUE_HEADS:
        if plain.get(name) is not None:
            sizes[name] = kept if groups > 1 else groups
    for name in WIDTHS:
        if plain.get(name) is not None:
            sizes[name] = max(1, round(plain[name] * part))
    if not small and plain.get("first_k_dense_replace"):  # the layers in front that have no experts
        sizes["first_k_dense_replace"] = round(
            plain["first_k_dense_replace"] * layers / config.num_hidden_layers
        )
    # Some configs, such as GPT-2's, use other names for these.
    sizes = {config.attribute_map.get(name, name): value for name, value in sizes.items()}
    by_layer = {
        name: value[:layers]
        for name, value in plain.items()
        if isinstance(value, list) and len(value) == config.num_hidden_layers
    }
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1)
    made = type(config)(**{**plain, **by_layer, **sizes, **ends})
    return Proxy(made, config.num_hidden_layers / layers, config.hidden_size / made.hidden_size)


def _key_value_heads(config: "PreTrainedConfig") -> int:
    given = (getattr(config, name, None) for name in KEY_VALUE_HEADS)
    return next((groups for groups in given if groups), config.num_attention_heads)


def standin_tokenizer() -> "PreTrainedTokenizerBase":
    """A tokenizer with `SMALLEST` entries: one token for each word of the text that `standin` writes."""
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
    """The number of tokens in a text; without a tokenizer, a quarter of its characters."""
    if tokenizer is None:
        return lambda text: max(1, len(text) // 4)
    return lambda text: max(1, len(tokenizer(text, add_special_tokens=False)["input_ids"]))  # pyright: ignore


def standin(examples: Examples, length: Callable[[str], int]) -> Examples:
    """Examples of random words: of the same kinds and token lengths, and as many, up to some hundreds."""
    draw = random.Random("weightgeom stand-in")

    def random_words(text: Any) -> str:
        return "".join(f" w{draw.randrange(SMALLEST - 2)}" for _ in range(length(plain_text(text))))

    def pairs(real: Sequence[Pair]) -> list[Pair]:
        return [Pair(*map(random_words, (pair.prompt, pair.chosen, pair.rejected))) for pair in real[:PAIRS]]

    def questions(real: Sequence[Question]) -> list[Question]:
        return [Question(random_words(pair.prompt), random_words(pair.answer)) for pair in real[:PAIRS]]

    def documents(real: Sequence[str]) -> list[str]:
        return [random_words(text[:20_000]) for text in real[:DOCUMENTS]]

    return replace(
        examples,
        text=documents(examples.text),
        heldout=documents(examples.heldout),
        pairs=pairs(examples.pairs),
        heldout_pairs=pairs(examples.heldout_pairs),
        questions=questions(examples.questions),
        groups={name: questions(prompts) for name, prompts in examples.groups.items()},
        abstentions=[random_words(answer) for answer in examples.abstentions],
    )


def assumed(name: str, number: int, length: int) -> Examples:
    """Assumed examples in place of data not downloaded yet: pairs and documents of `length` tokens each."""
    document = "word" * length  # `lengths_by` counts a quarter of the characters
    heldout = max(2, number // 10)
    prompt, response = document[: len(document) // 4], document[: 3 * len(document) // 4]
    pair, few = Pair(prompt, response, response), min(number, PAIRS)
    few_heldout = min(few, heldout)
    return Examples(name, [document] * few, [document] * few_heldout, [pair] * few, [pair] * few_heldout, "")

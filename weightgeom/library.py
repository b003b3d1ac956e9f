"""Measurements from Python: two checkpoints compared by probes, and the subspaces of one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

import torch

from weightgeom import probes as probe_files
from weightgeom.bases.sources import Source, check_apart, check_fits, plain_config, source_of
from weightgeom.estimators.pairs import together
from weightgeom.estimators.per_matrix import as_probe
from weightgeom.estimators.reference_subspaces import (
    Inputs,
    Place,
    check_dimensions,
    dimensions,
    input_frames,
    most_tokens,
    prediction_frame,
)
from weightgeom.geometry.subspace import Subspace
from weightgeom.interfaces import NeedsExamples, Probe, Setting
from weightgeom.models.adapters import warn_of_other_base
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.loading import (
    check_vocabulary,
    load_tokenizer,
    unloaded,
    warn_of_other_settings,
    warn_of_other_vocabulary,
)
from weightgeom.models.weights import check_finite, difference
from weightgeom.params import Params
from weightgeom.table import tabulate
from weightgeom.text.examples import Examples
from weightgeom.text.files import fingerprint, first_line
from weightgeom.text.tokens import packed

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FEWEST = 16  # tokens of all texts together: fewer say nothing of a model (ours)


def measure(
    before: "str | Path | PreTrainedModel | Mapping[str, torch.Tensor | np.ndarray]",
    after: "str | Path | PreTrainedModel | Mapping[str, torch.Tensor | np.ndarray]",
    *,
    texts: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    probes: Sequence[str | type | Probe] = ("rsf",),
    k: int | Sequence[int] | None = None,
    config: "PreTrainedConfig | None" = None,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> "pd.DataFrame":
    """Measure the update from one checkpoint to another by probes, as a tidy table.

    A checkpoint is a directory, a hub name (`name@revision`), a transformers network or a state dict of
    tensors or NumPy arrays; `after` may also be the directory of a LoRA adapter of `before`. The config of a
    state dict is that of the other checkpoint, or `config`. A caller's network is not run, but one of its
    config in evaluation mode: its mode, weights, dtype, device and gradients stay as they are. The prefixes
    `module.` and `_orig_mod.` of parameters are passed over.

    `texts` are the documents that the inputs and the behaviour are measured on, in order, up to the tokens
    that a probe takes; blank ones are left out. `tokenizer` defaults to that of the directory `before`, or
    else `after`. `probes` are names (`rsf`, `spectrum`, `behaviour`, `overlap`, ...), classes or configured
    objects such as `RSF(k=16, per_head=True)`. `k`, the dimension of the subspaces or a list of them, is for
    names and classes; by default it is d/8. No objective is known, so quantities that need one have no rows.

    The rows are those of `after`, at step 1, one number each with its `unit` and `n`; the columns are
    `weightgeom.table.COLUMNS`. They equal, to the bit and on one device, those at step 1 of

        weightgeom run objective=none model=pair model.before=BEFORE model.after=AFTER
            data=text data.train=... data.heldout=FILE probe=[rsf] probe.rsf.k=16

    where the documents of FILE are `texts`; without `data.heldout` those are every tenth document of
    `data.train`.

    Examples:
        >>> table = measure("base", "aligned", texts=texts, probes=["rsf"], k=16)
        >>> ratios = table[(table["quantity"] == "ratio") & (table["subspace"] != "random")]
        >>> ratios.pivot_table("value", "layer", "matrix")

    Raises:
        FileNotFoundError: if a directory, its weights or its tokenizer is missing.
        KeyError: if there is no probe of a name.
        NotImplementedError: if the model's type has no residual-stream map.
        TypeError: if an argument is of the wrong kind, such as a single string for `texts`.
        ValueError: if the two differ in a name or a shape, if they are the same tensors, if the text is
            shorter than k tokens, if the tokenizer has more tokens than the model has embeddings, if k does
            not fit, or if a probe has no rows.
    """
    examples = _examples(texts)
    start, end = source_of(before, "before"), source_of(after, "after")
    if start.is_adapter:
        raise ValueError(f"before={before} is an adapter: give its base model there instead")
    chosen = _chosen(probes, k)
    model = _model([start, end], tokenizer, config, device)
    base = _weights(start, model, examples)
    moved = end.params(model.architecture, base)
    if not end.is_adapter:  # which fits, and would be multiplied out
        difference(moved, base, model.architecture)
    if end.directory is not None and end.is_adapter and isinstance(before, (str, Path)):
        warn_of_other_base(end.directory, str(before))
    if start.directory is not None and end.directory is not None:
        warn_of_other_settings(start.directory, end.directory)
        warn_of_other_vocabulary(start.directory, end.directory)
    check_apart(base, moved)
    check_finite(moved, model.architecture, str(end.directory or end.label))
    setting = Setting(model, base, moved, False, examples, seed, last=1)
    for name, probe in chosen:
        _check(name, probe, k, setting)
    rows: list[dict[str, Any]] = []
    walked = together({str(place): probe for place, (_, probe) in enumerate(chosen)}, setting)(moved)
    for place, (name, probe) in enumerate(chosen):
        measured = walked[str(place)] if str(place) in walked else probe.measurement(setting)(moved)
        if not measured:
            raise ValueError(
                f"the probe {name} has no rows for two checkpoints alone: it needs an objective, which"
                " `weightgeom run objective=...` has"
            )
        rows += ({"step": 1, **row} for row in measured)
    return tabulate(rows)


def subspaces(
    network: "str | Path | PreTrainedModel | Mapping[str, torch.Tensor | np.ndarray]",
    tokenizer: "PreTrainedTokenizerBase | None",
    texts: Iterable[str],
    k: int | None = None,
    *,
    tokens: int = 8192,
    length: int = 96,
    config: "PreTrainedConfig | None" = None,
    device: str | torch.device = "auto",
) -> dict[Place, Subspace]:
    """The subspaces that a checkpoint's updates are compared with, by name and layer.

    `("attention_input", layer)` and `("mlp_input", layer)` are spanned by the top-k principal directions of
    the inputs of q, k, v and of gate, up on `texts` (second moments, uncentred, over at most `tokens` tokens
    in sequences of `length`), `("prediction", None)` by the top-k right singular vectors of the unembedding,
    centred and with the final norm's gain. Each has an orthonormal `basis` of shape (d_model, k) in fp64,
    strongest direction first. They are those of the probe `rsf` up to the rounding of fp32 sums, but for
    those of single experts.

    Checkpoints, tokenizer, texts and their errors are as in `measure`; k is d/8 by default.

    Examples:
        >>> spaces = subspaces(network, tokenizer, texts, k=16)
        >>> spaces["attention_input", 0].basis.shape
    """
    examples = _examples(texts)
    source = source_of(network, "network")
    if source.is_adapter:
        raise ValueError(f"network={network} is an adapter: merge it into its base model and give that")
    model = _model([source], tokenizer, config, device)
    params = _weights(source, model, examples)
    d = model.architecture.d_model
    check_dimensions(k, d, "k")
    (k,) = dimensions(k, d)
    _check_tokens(examples, model, k, length, tokens)
    setting = Setting(model, params, params, False, examples, seed=0)
    frames = list(input_frames(setting, params, k, Inputs(tokens=tokens, length=length)))
    return {frame.place: frame.space for frame in (*frames, prediction_frame(setting, params, k))}


def _examples(texts: Iterable[str]) -> Examples:
    if isinstance(texts, str):
        raise TypeError(
            "texts must be a list of documents, got one string: write texts=[text], or for a file"
            " texts=weightgeom.text.files.read_documents(FILE)"
        )
    if not isinstance(texts, Iterable) or isinstance(texts, Mapping):
        raise TypeError(f"texts must be a list of documents, got {type(texts).__name__}")
    documents = list(texts)
    if wrong := [document for document in documents if not isinstance(document, str)]:
        raise TypeError(
            f"texts must be a list of strings, got {type(wrong[0]).__name__} in it: give the documents"
            ' alone, such as [record["text"] for record in records]'
        )
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(
            "texts is empty: give documents of the kind that the model reads, some 8000 tokens together"
        )
    return Examples("texts", [], documents, [], [], digest=fingerprint([], documents))


def _chosen(probes: Sequence[str | type | Probe], k: int | Sequence[int] | None) -> list[tuple[str, Probe]]:
    """The probes with the names that errors call them by."""
    if isinstance(probes, str):
        raise TypeError(f"probes must be a list, got one string: write probes=[{probes!r}]")
    chosen = [_probe(choice, k) for choice in probes]
    if not chosen:
        raise ValueError('probes is empty: give some, such as probes=["rsf"]')
    takes_k = [
        "k" in _settings(probe)
        for choice, (_, probe) in zip(probes, chosen, strict=True)
        if isinstance(choice, (str, type))
    ]
    if k is not None and not any(takes_k):
        raise ValueError(f"no probe takes k={k}: leave it out, or set it in the configured probe")
    return chosen


def _probe(choice: object, k: int | Sequence[int] | None) -> tuple[str, Probe]:
    from pydantic import ValidationError

    kind: Any = _named(choice) if isinstance(choice, str) else choice
    name = choice if isinstance(choice, str) else getattr(choice, "__name__", type(choice).__name__)
    if isinstance(kind, type):
        wanted = k if k is None or isinstance(k, int) else list(k)
        try:
            kind = kind(k=wanted) if _takes_k(kind) else kind()
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ValueError(f"the probe {name} does not take k={k}: {reason.lower()}") from error
    kind = as_probe(kind)
    if not isinstance(kind, Probe):
        raise TypeError(
            f"a probe is a name, a class or a configured object such as RSF(k=16), got {choice!r}"
        )
    return name, kind


def _takes_k(kind: type) -> bool:
    return is_dataclass(kind) and any(field.name == "k" for field in fields(kind))


def _named(name: str) -> type:
    """The probe's class, the one in its file that has a declaration or is a function of two matrices."""
    names = sorted(module.name for module in iter_modules(probe_files.__path__))
    if name not in names:
        raise KeyError(f"unknown probe {name!r}; choose from {', '.join(names)}")
    module = import_module(f"{probe_files.__name__}.{name}")
    return next(
        thing
        for thing in vars(module).values()
        if isinstance(thing, type)
        and thing.__module__ == module.__name__
        and {"declaration", "of_matrix"} & vars(thing).keys()
    )


def _settings(probe: Probe) -> dict[str, Any]:
    """The fields of a probe, by name."""
    return {field.name: getattr(probe, field.name) for field in fields(probe)} if is_dataclass(probe) else {}


def _model(
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerBase | None",
    config: "PreTrainedConfig | None",
    device: str | torch.device,
) -> LanguageModel:
    """The network of the first checkpoint, without weights, with its tokenizer."""
    from transformers import PreTrainedConfig

    if config is not None and not isinstance(config, PreTrainedConfig):
        raise TypeError(
            "config must be a transformers config, such as AutoConfig.from_pretrained(NAME), got"
            f" {type(config).__name__}"
        )
    given = None if config is None else plain_config(config)
    first, *others = (source.config for source in sources)
    config = next((known for known in (first, given, *others) if known is not None), None)
    if config is None:
        raise ValueError(
            "a state dict says nothing of its network: add config=network.config, or"
            " config=AutoConfig.from_pretrained(NAME)"
        )
    return unloaded(config, _tokenizer(sources, tokenizer), _device(device))


def _tokenizer(
    sources: Sequence[Source], tokenizer: "PreTrainedTokenizerBase | None"
) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerBase

    if tokenizer is None:
        directory = next((source.directory for source in sources if source.directory is not None), None)
        if directory is None:
            raise ValueError(
                "weights in memory have no tokenizer: add tokenizer=AutoTokenizer.from_pretrained(NAME)"
            )
        return load_tokenizer(directory)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            "tokenizer must be a transformers tokenizer, such as AutoTokenizer.from_pretrained(NAME), got"
            f" {type(tokenizer).__name__}"
        )
    if tokenizer.eos_token is None:
        raise ValueError(
            "the tokenizer has no end token, which closes a document: set tokenizer.eos_token to the model's"
        )
    return tokenizer


def _device(wanted: str | torch.device) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {wanted!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}, and torch sees no GPU here: use device='cpu'")
    return device


def _weights(source: Source, model: LanguageModel, examples: Examples) -> Params:
    """The weights of a checkpoint; refuses those that do not belong to the model, and a text too short."""
    params = source.params(model.architecture)
    label = str(source.directory or source.label)
    check_fits(params, model.network, model.architecture, label)
    check_finite(params, model.architecture, label)
    check_vocabulary(model.tokenizer, len(params[model.architecture.embed]))
    count = 0
    for text in examples.heldout:
        count += len(model.tokenizer(text, add_special_tokens=False)["input_ids"])
        if count >= FEWEST:
            return params
    raise ValueError(
        f"texts have {count} tokens, too few to say anything of a model: give {FEWEST} or more, at best some"
        " thousands"
    )


def _check(name: str, probe: Probe, k: int | Sequence[int] | None, setting: Setting) -> None:
    """Refuse probes that cannot measure this model on this text."""
    model, settings = setting.model, _settings(probe)
    d = model.architecture.d_model
    if "k" in settings:
        check_dimensions(settings["k"], d, "k" if settings["k"] == k else f"k of the probe {name}")
    probe.check(model.architecture)
    if isinstance(probe, NeedsExamples):
        try:
            probe.check_examples(setting.examples)
        except ValueError as error:
            raise ValueError(
                f"the probe {name} needs more than texts ({first_line(error)}): use `weightgeom run`"
            ) from error
    if settings.keys() >= {"k", "length", "tokens"}:
        largest = dimensions(settings["k"], d)[-1]
        limit = settings["tokens"] or most_tokens(d)
        _check_tokens(setting.examples, model, largest, settings["length"], limit)


def _check_tokens(examples: Examples, model: LanguageModel, k: int, length: int, limit: int) -> None:
    batches = packed(examples.heldout, model.tokenizer, length, limit)
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    if tokens < k:
        raise ValueError(
            f"texts have {tokens} tokens, whose inputs cannot span k={k} directions: give more text or a"
            " smaller k"
        )

"""A residual map checked: every invariant on a small random network of a model's config."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightgeom.bases.hub import fetch
from weightgeom.estimators.lm_head import logits_of
from weightgeom.estimators.moments import activation_moments
from weightgeom.models.invariants import INVARIANTS, Invariant
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.loading import load_config
from weightgeom.models.residual import text_part
from weightgeom.models.small_config import small_config
from weightgeom.models.specimen import TOKENS, Specimen
from weightgeom.text.files import first_line
from weightgeom.text.tokens import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def logits_are_those_of_the_library(specimen: Specimen) -> None:
    """The library makes the network's logits of its final hidden states."""
    final = specimen.architecture.final_norm.parameter.removesuffix(".weight")
    logits = logits_of(specimen.network, specimen.flow.outputs[final])
    if not torch.allclose(logits, specimen.flow.logits.to(logits), rtol=1e-5, atol=1e-5):
        raise ValueError(
            "the network changes its logits behind the unembedding in a way that logits_of has not"
        )


def moments_are_those_of_the_inputs(specimen: Specimen) -> None:
    """The second moment of a site is that of its input, over a padded batch."""
    length = TOKENS.shape[1] // 2
    mask = torch.ones(2, TOKENS.shape[1], dtype=torch.long)
    mask[1, length:] = 0
    batch = Batch(TOKENS.repeat(2, 1), mask, mask.bool())
    tokenizer: Any = None  # nothing is tokenized
    model = LanguageModel(specimen.network, tokenizer, specimen.architecture)
    sites = specimen.architecture.sites
    for site, moment in activation_moments(model, specimen.params, [batch], sites):
        a = specimen.flow.inputs[site.module]
        a = torch.cat([a, a[:length]])  # the second sequence is the beginning of the first
        expected = a.T @ a / len(a)
        if not torch.allclose(moment.value.double(), expected, rtol=1e-3, atol=1e-4):
            raise ValueError(f"the moment at {site.module} is not that of its input: see Samples.by_sequence")


CHECKS: tuple[Invariant, ...] = (
    *INVARIANTS,
    logits_are_those_of_the_library,
    moments_are_those_of_the_inputs,
)


# Types whose defaults lack a sort of layer that their models have.
VARIED: Mapping[str, dict[str, Any]] = {"lfm2": {"full_attn_idxs": [2, 5, 8]}}


def config_of(name: str) -> "PreTrainedConfig":
    """The config of a model type with its defaults, of a checkpoint directory, or of a hub model.

    Raises:
        FileNotFoundError: if it is none of them, or the hub does not give the config.
        ValueError: if the config cannot be read.
    """
    from transformers import CONFIG_MAPPING

    if name not in CONFIG_MAPPING or Path(name).is_dir():
        return load_config(fetch(name, weights=False))
    config = text_part(CONFIG_MAPPING[name](**VARIED.get(name, {})))
    groups = getattr(config, "num_key_value_heads", None)
    latent = getattr(config, "kv_lora_rank", None) is not None  # then each head has its own keys and values
    if groups is not None and groups == config.num_attention_heads and not latent:
        config.num_key_value_heads = groups // 2  # groups are checked wherever the type can have them
    return config


def failure(invariant: Invariant, specimen: Specimen) -> str | None:
    """Why an invariant does not hold; None if it does."""
    try:
        invariant(specimen)
    except ValueError as error:
        return str(error)
    except Exception as error:  # a wrong map can fail anywhere: by a name, by a shape
        return f"{type(error).__name__}: {first_line(error)}"
    return None


@contextmanager
def _unwarned() -> Iterator[None]:
    """Within it transformers does not warn of settings of a config that do not go with its small sizes."""
    from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

    before = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(before)


@_unwarned()
def main(arguments: Sequence[str]) -> int:
    """Print each invariant of a model's map as passed or failed; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="weightgeom check",
        description="Check the residual map of a model on a small random network of its config.",
    )
    parser.add_argument(
        "model", help="a model type such as olmo3, a checkpoint directory, or a hub name (NAME@REVISION)"
    )
    model = parser.parse_args(arguments).model
    try:
        config = small_config(config_of(model))
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    specimen = Specimen.of(config)
    failures = 0
    for invariant in CHECKS:
        reason = failure(invariant, specimen)
        failures += reason is not None
        claim = first_line(ValueError(invariant.__doc__))
        print(f"passed  {claim}" if reason is None else f"failed  {claim}: {reason}")
    print(
        f"{len(CHECKS) - failures} of {len(CHECKS)} invariants hold for {config.model_type}, in a network of"
        f" {config.num_hidden_layers} layers"
    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

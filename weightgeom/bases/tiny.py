"""The embedded base: a small GPT-NeoX, pretrained once on the run's own text."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.architectures import gpt_neox
from weightgeom.bases.outline import Outline, Pretraining
from weightgeom.data.text import TextFiles
from weightgeom.data.world import SPECIAL_TOKENS, World
from weightgeom.interfaces import Data, Log, Stage
from weightgeom.interruption import Request, no_request
from weightgeom.models.loading import check_length
from weightgeom.models.residual import Architecture
from weightgeom.objectives.ce import CE
from weightgeom.text.examples import Examples
from weightgeom.text.files import fingerprint
from weightgeom.training.config import Training
from weightgeom.training.fit import saved_trajectory
from weightgeom.training.processes import fit_on_processes
from weightgeom.trajectory import Base

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiny:
    """A randomly initialised GPT-NeoX, pretrained by cross-entropy on a corpus, with all its checkpoints.

    `corpus` is the pretraining text: `null` for the text of the run's data, `world`, or text files. The
    tokenizer is the world's own, or a BPE tokenizer of `vocabulary` entries trained on the other text.
    `seed` determines the initialisation and the order of the examples.
    """

    corpus: str | list[str] | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    d_model: int = Field(default=128, ge=8)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    d_mlp: int = Field(default=512, ge=8)
    context: int = Field(default=512, ge=8)  # tokens
    vocabulary: int = Field(default=2048, ge=300)  # entries of the BPE tokenizer
    pretraining: Training = Field(default_factory=Training)

    def __post_init__(self) -> None:
        """Refuse inconsistent sizes."""
        if self.d_model % self.heads:
            raise ValueError(f"d_model must be a multiple of heads, got {self.d_model} and {self.heads}")
        if self.pretraining.max_length > self.context:
            raise ValueError(
                "pretraining.max_length must be at most context, got"
                f" {self.pretraining.max_length} and {self.context}"
            )

    def check(self, longest: int | None) -> Architecture:
        """The map of the network to be pretrained; raises if a sequence is too long or a file is missing."""
        check_length(longest or 0, self.context)
        if self.corpus not in (None, "world"):
            TextFiles(train=self.corpus).files()
        return gpt_neox.architecture(self._config(self.vocabulary, 0))

    def prepare(
        self, stage: Stage, examples: Examples, data: Data, device: str, request: Request = no_request
    ) -> Base:
        """Pretrain the model, or reuse an identical earlier pretraining."""
        corpus, text = self._corpus(examples, data)

        def work(directory: Path, log_metrics: Log) -> None:
            tokenizer = corpus.tokenizer() if isinstance(corpus, World) else _bpe(text.text, self.vocabulary)
            config = self._config(len(tokenizer), tokenizer.get_vocab()["<eos>"])
            place = "cpu" if self.pretraining.shard else device
            fit_on_processes(
                CE("text"),
                partial(_initialised, config, tokenizer, self.seed, place),
                text,
                self.pretraining,
                directory,
                name="the base",
                seed=self.seed,
                device=device,
                log_metrics=log_metrics,
                request=request,
            )

        words = corpus.words() if isinstance(corpus, World) else []
        model = asdict(replace(self, pretraining=self.pretraining.of_result))
        specification = {"model": model, "text": fingerprint(text.text, words), "device": device}
        directory = stage("pretraining", specification, work, self.pretraining.steps)
        checkpoints = saved_trajectory(directory, "pretraining")
        return Base(checkpoints.steps[checkpoints.last], f"pretraining/{directory.name}", checkpoints)

    def outline(self, examples: Examples, data: Data) -> Outline:
        """The config of the network to be pretrained, and its pretraining."""
        corpus, text = self._corpus(examples, data)
        tokenizer = corpus.tokenizer() if isinstance(corpus, World) else None
        config = self._config(self.vocabulary if tokenizer is None else len(tokenizer), 0)
        return Outline(
            config, pretraining=Pretraining(CE("text"), self.pretraining, text), tokenizer=tokenizer
        )

    def _corpus(self, examples: Examples, data: Data) -> tuple[Data, Examples]:
        """The pretraining data and its examples."""
        if self.corpus is not None:
            data = World() if self.corpus == "world" else TextFiles(train=self.corpus)
            examples = data.examples()
        if not examples.text:
            raise ValueError(
                f"{examples.name} has no text to pretrain the tiny model on: set model.corpus to world or to"
                " text files"
            )
        return data, examples

    def _config(self, vocabulary: int, end: int) -> "GPTNeoXConfig":
        from transformers import GPTNeoXConfig

        return GPTNeoXConfig(
            vocab_size=vocabulary,
            hidden_size=self.d_model,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.d_mlp,
            max_position_embeddings=self.context,
            bos_token_id=end,
            eos_token_id=end,
        )


def _initialised(
    config: "GPTNeoXConfig", tokenizer: "PreTrainedTokenizerBase", seed: int, device: str
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The random network of a config, with its tokenizer."""
    import transformers

    transformers.set_seed(seed)
    return transformers.GPTNeoXForCausalLM(config).to(device), tokenizer  # pyright: ignore[reportArgumentType]


def _bpe(texts: Sequence[str], vocabulary: int) -> "PreTrainedTokenizerBase":
    """A byte-level BPE tokenizer trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    log.info("trained a tokenizer with %d entries on %d documents", backend.get_vocab_size(), len(texts))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)

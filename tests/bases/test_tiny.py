from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
from transformers import AutoModelForCausalLM, AutoTokenizer

from weightgeom.bases.tiny import Tiny
from weightgeom.data.text import TextFiles
from weightgeom.interfaces import Log
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training

TINY = Tiny(
    d_model=32,
    layers=2,
    heads=4,
    d_mlp=64,
    context=64,
    vocabulary=300,
    pretraining=Training(steps=2, batch_size=4, max_length=32),
)


class Stage:
    """Makes every stage in a directory of its own and keeps the specifications."""

    def __init__(self, directory: Path, dry: bool = False) -> None:
        self.directory, self.dry = directory, dry
        self.specifications: list[Mapping[str, object]] = []

    def __call__(
        self, name: str, specification: Mapping[str, object], work: Callable[[Path, Log], None], steps: int
    ) -> Path:
        self.specifications.append(specification)
        directory = self.directory / str(len(self.specifications))
        directory.mkdir()
        if self.dry:
            (directory / "step-0").mkdir()
        else:
            work(directory, small.Curves())
        return directory


def prepared(tiny: Tiny, data: Any, directory: Path, dry: bool = False) -> tuple[Any, Mapping[str, object]]:
    stage = Stage(directory, dry)
    return tiny.prepare(stage, data.examples(), data, "cpu"), stage.specifications[0]


def test_on_the_world_the_tiny_base_is_a_gpt_neox_with_the_worlds_tokenizer_and_checkpoints(tmp_path):
    base, _ = prepared(TINY, small.WORLD, tmp_path)
    assert base.trajectory is not None and list(base.trajectory.steps) == [0, 1, 2]
    assert base.trajectory.from_random and base.directory == base.trajectory.steps[2]
    network = AutoModelForCausalLM.from_pretrained(base.directory)
    assert network.config.model_type == "gpt_neox" and network.config.hidden_size == 32
    words = AutoTokenizer.from_pretrained(base.directory).get_vocab()
    assert words == small.WORLD.tokenizer().get_vocab() and network.config.vocab_size == len(words)
    assert TINY.check(longest=64).d_model == 32


def test_on_other_text_it_has_a_bpe_tokenizer_that_loses_nothing(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"The {n}th naïve café — déjà vu,\tagain: {n * n}." for n in range(200)))
    base, _ = prepared(TINY, TextFiles(train=str(file)), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base.directory)
    assert len(tokenizer) == 300
    text = "The 7th naïve café — déjà vu,\tagain: 49."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_one_base_serves_all_kinds_of_preference_and_no_other_text_or_seed(tmp_path):
    def specification(tiny: Tiny, world: Any, name: str) -> Mapping[str, object]:
        (tmp_path / name).mkdir()
        return prepared(tiny, world, tmp_path / name, dry=True)[1]

    style = specification(TINY, small.WORLD, "style")
    assert specification(TINY, replace(small.WORLD, preference="facts"), "facts") == style
    assert specification(TINY, replace(small.WORLD, pairs=10), "pairs") == style
    assert specification(TINY, replace(small.WORLD, seed=1), "world") != style
    assert specification(TINY, replace(small.WORLD, heldout_entities=5), "words") != style
    assert specification(replace(TINY, seed=1), small.WORLD, "seed") != style


def test_a_corpus_of_its_own_replaces_the_runs_text(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("\n\n".join(f"document {n}" for n in range(40)))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, own = prepared(replace(TINY, corpus=str(file)), small.WORLD, tmp_path / "a", dry=True)
    _, same = prepared(TINY, TextFiles(train=str(file)), tmp_path / "b", dry=True)
    assert own["text"] == same["text"]


def test_data_without_text_and_sizes_that_do_not_go_together_are_refused(tmp_path):
    nothing = Examples("pairs only", [], [], [], [], "")
    with pytest.raises(ValueError, match=r"pairs only has no text to pretrain .* model\.corpus"):
        TINY.prepare(Stage(tmp_path), nothing, small.WORLD, "cpu")
    with pytest.raises(ValueError, match="d_model must be a multiple of heads, got 32 and 5"):
        replace(TINY, heads=5)
    with pytest.raises(ValueError, match=r"pretraining\.max_length must be at most context, got 32 and 16"):
        replace(TINY, context=16)
    with pytest.raises(ValueError, match="max_length is 65 tokens and the model takes 64"):
        TINY.check(longest=65)
    with pytest.raises(FileNotFoundError, match=r"no file nothere\.txt"):
        replace(TINY, corpus=str(tmp_path / "nothere.txt")).check(longest=None)
    with pytest.raises(ValueError, match="seed"):
        replace(TINY, seed=-1)

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

from collections import Counter
from math import exp
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from app import ROOT
from llamas import llama
from transformers import GPTNeoXForCausalLM
from typer.testing import CliRunner
from updates import CONFIG, base, gaussian, moved

import weightgeom as wg
from runners.cli.app import app
from weightgeom.geometry.nulls import rotated
from weightgeom.origins.answer import KNOWN
from weightgeom.origins.classifier import measurements
from weightgeom.origins.validation import held_out, rates

OTHERS = {"bias": "bias", "norm": "norm", "embed_in": "embed", "lm_head": "unembed"}


def saved(weights: dict[str, torch.Tensor], directory: Path) -> str:
    network = GPTNeoXForCausalLM(CONFIG)
    network.load_state_dict(weights, strict=False)
    network.save_pretrained(directory)
    return str(directory)


def like_a_training(before: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Gaussian updates with the norms that trainings of the set have on average."""
    known = pd.read_parquet(KNOWN)
    mean = known[known["label"] == "noise"][measurements(known)].mean()
    sizes = {
        "query_key_value": exp(mean[["size.q", "size.k", "size.v"]].mean()),
        "attention.dense": exp(mean["size.o"]),
        "h_to_4h": exp(mean["size.up"]),
        "4h_to_h": exp(mean["size.down"]),
        **{part: mean[f"share.{kind}"] / (1 - mean[f"share.{kind}"]) for part, kind in OTHERS.items()},
    }
    updates = gaussian(before, 0.03, seed)
    parts = {name: next(part for part in (*OTHERS, *sizes) if part in name) for name in updates}
    return {name: sizes[parts[name]] * update for name, update in updates.items()}


@pytest.mark.slow
def test_noise_is_called_noise() -> None:
    answers: Counter[Any] = Counter()
    for seed in range(6):
        before = base(seed)
        origin = wg.origin(before, moved(before, like_a_training(before, seed)), config=CONFIG)
        assert origin.noise > 0.8 and origin.lora < 0.1
        answers[origin.answer] += 1
    assert set(answers) <= {"noise", None} and answers["noise"] >= 3


def test_pruning_which_no_training_made_has_no_answer() -> None:
    before = base()
    after = {name: weight * (weight.abs() > weight.abs().quantile(0.1)) for name, weight in before.items()}
    origin = wg.origin(before, after, config=CONFIG)
    assert origin.answer is None and origin.reason


def test_a_model_outside_of_the_set_is_refused_in_words(tmp_path: Path) -> None:
    before, after = llama(0), llama(1)
    origin = wg.origin(before, after)
    assert origin.answer is None and not origin.likelihoods and not origin.fits
    assert "llama of width" in origin.reason and "gpt_neox of width 32 to 48" in origin.reason


def test_the_command_answers_about_two_directories(tmp_path: Path) -> None:
    before = base(3)
    ends = [
        saved(before, tmp_path / "base"),
        saved(moved(before, like_a_training(before, 1)), tmp_path / "end"),
    ]
    ended = CliRunner().invoke(app, ["origin", *ends])
    assert ended.exit_code == 0
    lines = dict(
        line.rsplit(maxsplit=1) for line in ended.output.splitlines() if line and "answer" not in line
    )
    table = pd.read_parquet(KNOWN)
    assert sum(float(lines[name]) for name in set(table["label"])) == pytest.approx(1, abs=0.006)
    assert float(lines["no training"]) > 0.8
    assert ended.output.splitlines()[-1].split(maxsplit=1)[1].startswith(("noise", "cannot tell"))
    refused = CliRunner().invoke(app, ["origin", ends[0], ends[0]])
    assert refused.exit_code == 2 and "has moved" in refused.output


def test_the_package_has_a_small_set_of_every_origin_and_its_answers_are_better_than_chance() -> None:
    assert KNOWN.stat().st_size < 300_000 and KNOWN.is_relative_to(ROOT)
    table = pd.read_parquet(KNOWN)
    assert table.groupby("label")["base"].nunique().min() == table["base"].nunique() >= 3
    assert not table.isna().any(axis=None)
    rates_of_package = rates(held_out(table, measurements(table), "base"))
    assert rates_of_package["objective_error"] < 0.75  # chance among four
    assert rates_of_package["form_error"] < 0.05


def test_a_table_of_other_columns_and_weights_without_a_config_are_refused(tmp_path: Path) -> None:
    before = base()
    after = moved(before, gaussian(before, 0.03))
    pd.DataFrame({"label": ["a"]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="lacks the column base"):
        wg.origin(before, after, config=CONFIG, known=tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"add config=network\.config"):
        wg.origin(before, after)


def test_a_turned_update_of_a_low_rank_is_no_adapter_training() -> None:
    before = base(5)
    generator = torch.Generator().manual_seed(2)
    updates = {}
    for name, weight in before.items():
        if weight.ndim == 2 and "layers" in name:
            factors = [torch.randn(size, 2, generator=generator) for size in weight.shape]
            updates[name] = rotated(0.002 * factors[0] @ factors[1].T, generator)
    origin = wg.origin(before, moved(before, updates), config=CONFIG)
    assert origin.answer in ("rotated+lora", None) and origin.lora < 0.5

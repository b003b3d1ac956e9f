"""The set of known trainings behind `weightgeom origin`, and how often its answers are wrong.

    .venv/bin/python benchmarks/origin.py              # make the set, then validate; resumes where it stopped
    .venv/bin/python benchmarks/origin.py --validate   # only validate the set that the package has

Trains embedded bases of three sizes and worlds by every objective, on every preference of the world, at three
learning rates, whole and as adapters, and measures the update after 8 and after 24 steps. Beside them stand
Gaussian updates with the norms of a training, and updates with the singular values of a training in random
directions. A last part has kinds of update that the set leaves out, which the answer should not name. Writes
`weightgeom/origins/known.parquet`; `unknown.parquet`, `validation.csv` and all answers in `outputs/origin`.
Some twenty minutes on one core.
"""

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch

from weightgeom.bases.tiny import Tiny
from weightgeom.data.world import World
from weightgeom.geometry.nulls import rotated
from weightgeom.interfaces import Log, Objective
from weightgeom.models.adapters import open_checkpoint
from weightgeom.models.loading import load_architecture, load_config, load_network, load_tokenizer
from weightgeom.models.weights import open_params
from weightgeom.objectives.ce import CE
from weightgeom.objectives.dpo import DPO
from weightgeom.objectives.grpo import GRPO
from weightgeom.objectives.kto import KTO
from weightgeom.origins.answer import KNOWN
from weightgeom.origins.classifier import AXES, Classifier, measurements
from weightgeom.origins.features import features
from weightgeom.origins.validation import ALL, held_out, rates
from weightgeom.params import Params
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training
from weightgeom.training.fit import fit
from weightgeom.training.lora import Lora

OUTPUTS = Path("outputs/origin")
UNKNOWN = "unknown.parquet"
STEPS = (8, 24)
OBJECTIVES: dict[str, Objective] = {"ce": CE("chosen"), "dpo": DPO(), "kto": KTO(), "rl": GRPO(completion=16)}
PREFERENCES = ("style", "facts", "facts_style")
RATES = {"low": 1e-4, "middle": 3e-4, "high": 1e-3}
log = logging.getLogger("origin")


@dataclass(frozen=True)
class Size:
    """A base: its width, layers, width of the MLP, and the rank of its adapters."""

    d_model: int
    layers: int
    d_mlp: int
    rank: int


BASES = {  # each with a world and an initialisation of its own
    "A": Size(32, 3, 128, 2),
    "B": Size(48, 2, 192, 4),
    "C": Size(48, 4, 96, 4),
}


@dataclass(frozen=True)
class Made:
    """A base on disk, with the number that its world and its initialisation have."""

    name: str
    size: Size
    number: int
    directory: Path

    def examples(self, preference: str) -> Examples:
        """The pairs of its world."""
        return world(self.number, preference).examples()


def world(number: int, preference: str) -> World:
    """A world of sixty entities."""
    return World(
        preference=preference,  # pyright: ignore[reportArgumentType]
        seed=number,
        entities=60,
        heldout_entities=0,
        values=10,
        documents=4000,
        pairs=480,
        heldout=2,
    )


def made(name: str) -> Made:
    """A base, pretrained once."""
    number, size = list(BASES).index(name), BASES[name]
    pretraining = Training(
        steps=400, learning_rate=3e-3, schedule="cosine", weight_decay=0.01, max_length=64, log_every=100
    )
    tiny = Tiny(
        seed=number,
        d_model=size.d_model,
        layers=size.layers,
        d_mlp=size.d_mlp,
        context=128,
        pretraining=pretraining,
    )
    data = world(number, "style")
    return Made(name, size, number, tiny.prepare(stage, data.examples(), data, "cpu").directory)


def stage(
    name: str, specification: Mapping[str, object], work: Callable[[Path, Log], None], steps: int = 0
) -> Path:
    """The directory that `work` fills, kept for the next time."""
    key = sha256(json.dumps(specification, sort_keys=True, default=str).encode()).hexdigest()[:12]
    directory = OUTPUTS / f"{name}-{key}"
    if not (directory / "DONE").exists():
        directory.mkdir(parents=True, exist_ok=True)
        work(directory, lambda metrics, step: None)
        (directory / "DONE").touch()
    return directory


def trained(
    base: Made, objective: Objective, examples: Examples, training: Training, directory: Path
) -> Iterator[tuple[int, Params, Params]]:
    """The weights before, and after each of `STEPS`, with the step."""

    def report(metrics: Mapping[str, float], step: int) -> None:
        if "reward" in metrics and step == training.steps:
            log.info("reward %.2f", metrics["reward"])

    network, tokenizer = load_network(base.directory), load_tokenizer(base.directory)
    options: dict[str, Any] = {
        "name": "training",
        "seed": base.number,
        "device": "cpu",
        "log_metrics": report,
    }
    fit(objective, network, tokenizer, examples, training, directory, start=base.directory, **options)
    architecture = load_architecture(base.directory)
    before = open_params(base.directory, architecture)
    for step in STEPS:
        yield step, before, open_checkpoint(directory / f"step-{step}", architecture, before)


def noise(update: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A matrix of iid Gaussian entries with the norm of the update."""
    drawn = torch.randn(update.shape, generator=generator, dtype=update.dtype)
    return drawn * (update.norm() / drawn.norm())


def shifted(
    before: Params, after: Params, change: Callable[[torch.Tensor, torch.Generator], torch.Tensor], seed: int
) -> Params:
    """`before` with another update of every parameter that moved: `change` of the one to `after`."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name in before:
        old = before[name].float()
        update = after[name].float() - old
        # A vector in a random direction is a row that is rotated on one side.
        matrix = update if update.ndim == 2 else update.reshape(1, -1)
        moved[name] = old + change(matrix, generator).view_as(old) if bool(update.any()) else old
    return moved


def training_of(base: Made, rate: str, adapter: bool, **more: Any) -> Training:
    """The settings of a training at one of the `RATES`."""
    return Training(
        steps=STEPS[-1],
        learning_rate=RATES[rate],
        lora=Lora(r=base.size.rank if adapter else None),
        log_every=8,
        max_length=64,
        **more,
    )


def rows_of(base: Made, name: str, preference: str, rate: str, adapter: bool) -> list[dict[str, Any]]:
    """The measured updates of one training, and of the random ones that have its norms or its spectrum."""
    examples, config = base.examples(preference), load_config(base.directory)
    # One training in four lends its size to random updates, each objective as often as the others.
    place = list(BASES).index(base.name) + PREFERENCES.index(preference) + list(RATES).index(rate)
    lends = list(OBJECTIVES).index(name) == place % len(OBJECTIVES)
    suffix, rows = "+lora" if adapter else "", []
    with TemporaryDirectory() as directory:
        training = training_of(base, rate, adapter)
        for step, before, after in trained(base, OBJECTIVES[name], examples, training, Path(directory)):
            pairs = {name + suffix: after}
            if lends:
                pairs[f"rotated{suffix}"] = shifted(before, after, rotated, step)
            if lends and not adapter:
                pairs["noise"] = shifted(before, after, noise, step)
            for label, end in pairs.items():
                at = {"label": label, "base": base.name, "data": preference, "rate": rate, "step": step}
                rows.append({**at, **features(before, end, config, seed=step)})
    return rows


def unknown_rows(base: Made) -> list[dict[str, Any]]:
    """Updates of kinds that the set does not have."""
    examples, config = base.examples("facts_style"), load_config(base.directory)
    ends: dict[str, Params] = {}
    trainings = {
        "continued pretraining": (CE("text"), training_of(base, "middle", False)),
        "dpo by sgd": (
            DPO(),
            replace(training_of(base, "middle", False), optimizer="sgd", learning_rate=0.1),
        ),
        "dpo by muon": (DPO(), replace(training_of(base, "middle", False), optimizer="muon")),
        "ce": (CE("chosen"), training_of(base, "middle", False)),
        "dpo": (DPO(), training_of(base, "middle", False)),
    }
    before = open_params(base.directory, load_architecture(base.directory))
    for name, (objective, training) in trainings.items():
        with TemporaryDirectory() as directory:
            for _, _, after in trained(base, objective, examples, training, Path(directory)):
                ends[name] = {key: after[key].clone() for key in after}
    ce, dpo = ends.pop("ce"), ends.pop("dpo")
    ends["mean of ce and dpo"] = {name: (ce[name] + dpo[name]) / 2 for name in ce}
    ends["rounding to bf16"] = {name: before[name].bfloat16().float() for name in before}
    ends["pruning"] = {
        name: before[name] * (before[name].abs() > before[name].abs().quantile(0.1)) for name in before
    }
    at = {"base": base.name, "data": "facts_style", "rate": "middle", "step": STEPS[-1]}
    return [{"label": name, **at, **features(before, end, config)} for name, end in ends.items()]


def kept(path: Path, key: str, work: Callable[[], Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows that `work` makes, read from `path` where an earlier call has written those of `key`."""
    file = path / f"{key}.json"
    if not file.exists():
        path.mkdir(parents=True, exist_ok=True)
        log.info("%s", key)
        file.write_text(json.dumps(work()))
    return json.loads(file.read_text())


def make() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The set of known updates, and the unknown ones."""
    known, unknown = [], []
    for name in BASES:
        base = made(name)
        for preference, rate, adapter, objective in product(PREFERENCES, RATES, (False, True), OBJECTIVES):
            key = f"{name} {preference} {rate} {objective}{'+lora' if adapter else ''}"
            arguments = (base, objective, preference, rate, adapter)
            known += kept(OUTPUTS / "rows", key, lambda given=arguments: rows_of(*given))
        unknown += kept(OUTPUTS / "rows", f"{name} unknown", lambda base=base: unknown_rows(base))
    return known, unknown


def stored(measured: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The table of some updates, in the precision of fp16 so that it is small."""
    table = pd.DataFrame(measured)
    sizes = [BASES[name] for name in table["base"]]
    table.insert(5, "model_type", "gpt_neox")
    table.insert(6, "d_model", [size.d_model for size in sizes])
    table.insert(7, "layers", [size.layers for size in sizes])
    numbers = measurements(table)
    return table.astype({name: "float16" for name in numbers}).astype({name: "float32" for name in numbers})


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table with its measurements in the encoding that leaves out the empty bits."""
    numbers = measurements(table)
    words = [name for name in table.columns if name not in numbers]
    encoding = {"use_dictionary": words, "use_byte_stream_split": numbers, "compression": "zstd"}
    table.to_parquet(path, index=False, **encoding)


def validated(known: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """The rates of every axis, by all measurements, by those of matrices, and by the size alone."""
    sized = known.assign(log_norm=np.log(known["relative_norm"]))
    everything = measurements(known)
    others = ("embed", "unembed", "norm", "bias")
    sets = {
        "all": everything,
        "matrices": [name for name in everything if name.rpartition(".")[2] not in others],
        "norm alone": ["log_norm"],
    }
    for measured, names in sets.items():
        for axis in (*AXES, "step", ALL):
            judged = held_out(sized, names, axis)
            if measured == "all":
                judged.to_csv(OUTPUTS / f"judged_{axis.replace(' ', '_')}.csv", index=False)
            yield {"measurements": measured, "held out": axis, **rates(judged)}


def print_validation(known: pd.DataFrame, unknown: pd.DataFrame) -> None:
    """Rates, confusions and the answers about kinds of update that the set lacks."""
    with pd.option_context("display.width", 250, "display.max_columns", 40, "display.max_rows", 200):
        print(
            f"{len(known)} updates, {known['label'].nunique()} origins, {len(measurements(known))} measured"
        )
        table = pd.DataFrame(validated(known))
        table.to_csv(OUTPUTS / "validation.csv", index=False)
        print(table.set_index(["measurements", "held out"]).T.to_string(float_format="{:.3f}".format))
        for axis in ("base", ALL):
            judged = pd.read_csv(OUTPUTS / f"judged_{axis.replace(' ', '_')}.csv")
            print(f"\n{axis} held out: the likeliest origin by the true one")
            print(pd.crosstab(judged["label"], judged["best"]).to_string())
        classifier = Classifier.of(known, measurements(known))
        print(
            f"\ntemperature {classifier.temperature:.2f}, threshold {classifier.threshold:.3f}, limit"
            f" {classifier.limit:.1f}"
        )
        judged = classifier.judge(unknown)
        print("\nkinds that the set lacks")
        print(
            unknown[["label", "base"]]
            .assign(
                answer=[judgement.answer or "cannot tell" for judgement in judged],
                fits=[", ".join(judgement.fits) for judgement in judged],
                distance=[judgement.distance for judgement in judged],
            )
            .to_string(index=False)
        )


def main() -> None:
    """Make, validate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--validate", action="store_true", help="make nothing")
    asked = parser.parse_args()
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    if not asked.validate:
        for path, measured in zip((KNOWN, OUTPUTS / UNKNOWN), make(), strict=True):
            write(stored(measured), path)
    print_validation(pd.read_parquet(KNOWN), pd.read_parquet(OUTPUTS / UNKNOWN))


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    log.setLevel(logging.INFO)
    torch.set_num_threads(1)
    main()

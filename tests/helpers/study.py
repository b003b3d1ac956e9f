"""Studies with known answers: runs whose tables are planted, published to MLflow as real ones are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runners.tracking.publisher import Publication
from runners.tracking.record import Record
from weightgeom.table import arm_columns, row, tabulate

if TYPE_CHECKING:
    import pandas as pd

ROLES = {"q": "read", "k": "read", "v": "read", "up": "read", "o": "write", "down": "write"}
PLACES = {"q": "attention_input", "k": "attention_input", "v": "attention_input", "up": "mlp_input"}
LAYERS, K, NULL_SD = (0, 1), 16, 0.1
TARGETS = {
    "dpo": {"_target_": "weightgeom.objectives.dpo.DPO", "beta": 0.1},
    "ce": {"_target_": "weightgeom.objectives.ce.CE", "train_on": "auto"},
    "none": {"_target_": None},
}
for name, level, negatives, tau in (
    ("graded/dpo", "sequence", None, 0.0),
    ("graded/ce", "token", None, 0.0),
    ("graded/token_tau01", "token", None, 0.1),
    ("graded/token_hard_1", "token", 1, 0.0),
    ("graded/token_hard_16", "token", 16, 0.0),
    ("graded/sequence_tau1", "sequence", None, 1.0),
):
    target = "weightgeom.objectives.graded_contrastive.GradedContrastive"
    TARGETS[name] = {"_target_": target, "level": level, "negatives": negatives, "tau": tau}


@dataclass(frozen=True)
class Planted:
    """One run: its objective, its seeds, and its tables by name."""

    objective: str
    tables: "Mapping[str, pd.DataFrame]"
    seed: int = 0
    base: int = 0  # seed of model and data
    sharpness: float | None = None
    params: Mapping[str, object] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    experiment: str = "study"
    name: str = ""
    status: Any = "FINISHED"

    @property
    def all_params(self) -> dict[str, object]:
        """As `run.py` flattens them."""
        made = {f"objective.{key}": value for key, value in TARGETS[self.objective].items()}
        return {
            **made,
            "model._target_": "weightgeom.bases.tiny.Tiny",
            "model.seed": self.base,
            "data.seed": self.base,
            "data.preference": "style",
            "training.steps": 64,
            **{f"probe.{name.partition('_')[0]}.k": None for name in self.tables},
            "seed": self.seed,
            "model": "tiny",
            "data": "world",
            "objective": self.objective,
            "training": "short",
            **self.params,
        }


def publish(directory: Path, uri: str, runs: Sequence[Planted]) -> None:
    """Records of the runs in `directory`, and what MLflow makes of them."""
    for number, run in enumerate(runs):
        data: Any = {"name": "world-style", "digest": "ab" * 16, "source": "world", "context": "all"}
        record = Record.create(
            directory / f"{run.experiment.replace('/', '_')}_{number}",
            experiment=run.experiment,
            name=run.name or run.objective,
            params=run.all_params,
            tags={"git_commit": "c0ffee" * 6, "git_dirty": "true", "code_fingerprint": "f00d", **run.tags},
            inputs=[data],
            tracking_uri=uri,
        )
        if run.sharpness is not None:
            for step, value in enumerate((run.sharpness - 0.1, run.sharpness + 0.1)):
                sharp = {"participation_ratio": value, "target_energy": 0.5, "alternatives": value}
                record.log({f"train/{name}": number for name, number in sharp.items()}, step)
        for name, table in run.tables.items():
            table.to_parquet(record.artifact(f"tables/{name}.parquet"))
            table.to_csv(record.artifact(f"tables/{name}.csv"), index=False)
        record.end(run.status)
        Publication(record, uri).publish(artifacts=True)


@cache  # nobody mutates the table
def rsf(
    read: float,
    write: float,
    steps: Sequence[int] = (1, 64),
    null_sd: float = NULL_SD,
    increments: float | None = None,
) -> "pd.DataFrame":
    """Ratios of `read` and `write` at the last step, the mean over two layers 0.2 apart; half before it.

    `increments` is the ratio of the write matrices' increments, but for the first, which has none of it.
    """
    rows = []
    for step, matrix in product(steps if increments else (), ("o", "down")):
        at: dict[str, Any] = {"step": step, "layer": 0, "matrix": matrix, "role": "write", "k": K}
        value = 0.9 if step == steps[0] else increments or 0.0
        rows.append(row("forward_increment_ratio", value, n=64, subspace="prediction", **at))
    for step, layer, (matrix, role) in product(steps, LAYERS, ROLES.items()):
        at: dict[str, Any] = {"step": step, "layer": layer, "matrix": matrix, "role": role}
        rows.append(row("delta_norm", 1.0, n=64, **at))
        ratio = (read if role == "read" else write) * (1 if step == steps[-1] else 0.5) + 0.2 * layer - 0.1
        for subspace, k in ((PLACES.get(matrix, "prediction"), K), ("random", K), ("prediction", 2 * K)):
            other = 50.0 if subspace == "random" or k != K else 0.0  # must not be counted
            p = 0.001 if ratio > 1 + 2 * null_sd else 0.6
            for quantity, value in (
                ("ratio", ratio + other),
                ("null_ratio_mean", 1.0 + other),
                ("null_ratio_sd", null_sd),
                ("q_value", p),
                ("matched_ratio", 5.0 + other),
            ):
                rows.append(row(quantity, value, n=64, **at, subspace=subspace, k=k))
    return tabulate(rows)


def behaviour() -> "pd.DataFrame":
    rows = [
        row(name, value + step / 64, n=96, unit=unit, step=step)
        for step in (0, 64)
        for name, unit, value in (("heldout_ce", "nats/token", 1.5), ("preference_accuracy", "1", 0.0))
    ]
    return tabulate(rows)


def moments(correlation: int, seed: int = 0) -> "pd.DataFrame":
    """Forecasts that rise (1) or fall (-1) with the measured ratio, and predictions at random."""
    generator = np.random.default_rng(seed)
    rows = []
    for layer, (matrix, role) in product(range(4), ROLES.items()):
        measured = 1 + generator.random()
        at: dict[str, Any] = {"step": 64, "layer": layer, "matrix": matrix, "role": role, "k": K}
        at["subspace"] = PLACES.get(matrix, "prediction")
        for name, value in (
            ("measured", measured),
            ("forecast", 3 + correlation * measured + 0.01 * generator.random()),
            ("predicted", 1 + generator.random()),
            ("mean", 1 + generator.random()),
        ):
            rows.append(row(f"{name}_ratio", value, n=64, **at))
    return tabulate(rows)


def rank1(treated: float, controls: float, bottom: float) -> "pd.DataFrame":
    """Edits of k and o in two layers at two strengths, against 19 random directions and a bottom one."""
    return tabulate(_rank1(treated, controls, bottom))


def _rank1(treated: float, controls: float, bottom: float) -> Iterator[dict[str, Any]]:
    for layer, (matrix, kind), dose in product(
        LAYERS, (("k", "activation"), ("o", "prediction")), ("0.1", "0.3")
    ):
        at: dict[str, Any] = {"step": 0, "layer": layer, "matrix": matrix, "role": ROLES[matrix], "k": K}
        at["subspace"] = PLACES.get(matrix, "prediction")
        size = float(dose)
        arms = [(arm_columns(kind, dose), treated), (arm_columns("bottom", dose, draw=0), bottom)]
        for draw in range(19):
            arms.append((arm_columns("random", dose, draw=draw), controls * (1 + draw / 100)))
        for arm, effect in arms:
            place = {"n": 22, "unit": "nats/token", **arm, **at}
            yield row("kl_from_unedited", effect * size, stderr=0.01, **place)
            yield row("heldout_ce_change", effect * size, stderr=0.01, **place)
            if arm["treatment"] == kind:
                yield row("predicted_heldout_ce_change", effect, **place)
        p = (1 + sum(controls * (1 + draw / 100) >= treated for draw in range(19))) / 20
        for effect in ("kl_from_unedited", "heldout_ce_change"):
            yield row(f"{effect}_p_value", p, n=19, **arm_columns(kind, dose, against="random"), **at)
            yield row(f"{effect}_q_value", p, n=19, **arm_columns(kind, dose, against="random"), **at)


def surgery(top: float, random: float, draws: int = 19) -> "pd.DataFrame":
    """Changes of the margin when top or random directions are removed, at two k, reads and writes."""
    rows = []
    for role, k in product(("read", "write"), (8, 16)):
        at: dict[str, Any] = {"step": 64, "role": role, "k": k}
        unit = "nats/pair"
        change = "preference_margin_change"
        rows.append(row(change, top, n=96, unit=unit, stderr=0.1, **arm_columns("top", "remove"), **at))
        for kind in ("random_k", "random_energy"):
            values = [random * (1 + draw / 100) for draw in range(draws)]
            for draw, value in enumerate(values):
                rows.append(
                    row(
                        change,
                        value,
                        n=96,
                        unit=unit,
                        stderr=0.1,
                        **arm_columns(kind, "remove", draw=draw),
                        **at,
                    )
                )
            p = (1 + sum(abs(value) >= abs(top) for value in values)) / (1 + draws)
            rows.append(
                row(f"{change}_p_value", p, n=draws, **arm_columns("top", "remove", against=kind), **at)
            )
    return tabulate(rows)


SHARP = {  # the mean number of alternatives of each objective
    "dpo": 1.1, "graded/dpo": 1.2, "graded/sequence_tau1": 1.3, "graded/token_hard_1": 1.4,
    "graded/token_hard_16": 1.8, "graded/token_tau01": 2.5, "ce": 3.5,
}  # fmt: skip
MATCHED = {"intervention.rank1.match": "output", "objective.train_on": "chosen"}


def agreeing() -> list[Planted]:
    """A study in which every claim of the paper holds: seven objectives on three bases, a seed each."""
    writes = (1.05, 1.1, 1.3, 1.5, 1.9, 2.5, 3.0)
    return [*_study(writes, 1, 5.0, 5.0, 3.0, 2.0)]


def contrary() -> list[Planted]:
    """A study in which the opposite of every claim holds."""
    writes = (4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.2)
    return [
        Planted(**{**vars(run), "experiment": "contrary"}) for run in _study(writes, -1, 1.0, 5.0, 2.0, 0.8)
    ]


def _study(
    writes: Sequence[float], sign: int, aligned: float, read: float, before: float, increments: float
) -> Iterator[Planted]:
    """Reads are `aligned` of the alignment by pairs and `read` of others; seeds differ by some per cent."""
    for seed in range(3):
        near = 1 + 0.01 * (seed + 0.3 * seed**2)  # no two seeds apart by the same
        pretraining = rsf(5.0, before * near, increments=increments * near)
        for (objective, sharpness), write in zip(SHARP.items(), writes, strict=True):
            contrasts = "dpo" in objective or "sequence" in objective
            nearer = 1 + 0.004 * seed * (1 + seed) + 0.001 * len(objective)
            tables = {
                "rsf_pretraining": pretraining,
                "rsf": rsf((aligned if contrasts else read) * nearer, write * nearer),
                "behaviour": behaviour(),
                "moments": moments(sign, seed + 10 * len(objective)),
            }
            if objective == "dpo":
                edit = (2.0, 0.5, 0.1) if sign > 0 else (0.3, 0.5, 0.9)
                tables["rank1"] = rank1(edit[0] * near, *edit[1:])
                tables["surgery"] = surgery((-2.0 if sign > 0 else -0.2) * near, -0.5)
            yield Planted(
                objective, tables, seed=seed, base=seed, sharpness=sharpness + 0.01 * seed,
                params=MATCHED if objective == "ce" else {"intervention.rank1.match": "output"},
            )  # fmt: skip

"""Whole studies of simulated updates: how often the report supports a claim that is false."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.geometry.nulls import adapter_moment
from weightgeom.geometry.subspace import Subspace
from weightgeom.table import Row, arm_columns, row, tabulate

if TYPE_CHECKING:
    import pandas as pd

Truth = Literal["noise", "seeds", "lora"]
SUBJECTS: dict[Truth, str] = {
    "noise": "Gaussian entries",
    "seeds": "one law for all objectives, which reads",
    "lora": "LoRA, B and A random",
}
# The claims that are false, by number and part of the setting's name; those left out hold, or are not tested.
FALSE: dict[Truth, tuple[tuple[int, str], ...]] = {
    "noise": ((1, ""), (2, "its inputs"), (4, ""), (5, ""), (6, ""), (7, ""), (8, ""), (9, "")),
    "seeds": ((4, ""), (5, ""), (6, ""), (7, ""), (8, ""), (9, "")),
    "lora": ((2, "its inputs"), (4, ""), (5, ""), (6, ""), (7, ""), (8, ""), (9, "")),
}
OBJECTIVES = {  # role and mean number of alternatives
    "dpo": ("contrast", 1.0),
    "ce": ("likelihood", 40.0),
    "graded/low": ("other", 3.0),
    "graded/middle": ("other", 8.0),
    "graded/high": ("other", 20.0),
}
D, K, RANK, ROWS, LAYERS = 48, 6, 8, 48, 2
MATRICES = {"q": "read", "k": "read", "v": "read", "up": "read", "o": "write", "down": "write"}


def false_support(truth: Truth, draws: int, seeds: int, generator: torch.Generator) -> int:
    """The number of simulated studies, of `draws`, in which a false claim is supported.

    A study has five objectives, each trained with every one of `seeds` seeds on a base of its own, in two
    layers of width 48; effects of edits, forecasts and increments are drawn without any relation.
    """
    from weightgeom.analysis.claims import verdicts
    from weightgeom.analysis.over_seeds import condense
    from weightgeom.analysis.rules import SUPPORTED

    happened = 0
    for _ in range(draws):
        rows, runs = study(truth, seeds, generator)
        judged = verdicts(condense(rows, runs), runs)
        supported = judged[judged["verdict"] == SUPPORTED]
        pairs = zip(supported["claim"], supported["setting"], strict=True)
        happened += any(
            claim == number and part in setting for claim, setting in pairs for number, part in FALSE[truth]
        )
    return happened


def study(truth: Truth, seeds: int, generator: torch.Generator) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """The rows and runs of a study, as the report reads them from the records of real ones."""
    import pandas as pd

    from weightgeom.analysis.settings import settings

    params, sharp, tables = [], [], []
    for seed in range(seeds):
        inputs = _covariance(generator)
        prediction = Subspace.random(D, K, generator)
        pretraining = tabulate(list(_pretrained(truth, prediction, generator)))
        for name, (role, alternatives) in OBJECTIVES.items():
            params.append(_params(name, seed))
            sharp.append((role, alternatives * (1 + 0.05 * _normal(generator))))
            made = {
                "rsf_pretraining": pretraining,
                "rsf": tabulate(list(_trained(truth, inputs, prediction, generator))),
                "moments": tabulate(list(_forecasts(generator))),
            }
            if role == "contrast":
                made["rank1"] = tabulate(list(_edits(generator)))
                made["surgery"] = tabulate(list(_removals(generator)))
            tables.append(made)
    tags = [{"objective.role": role, "objective.of_text": "false"} for role, _ in sharp]
    described, rows = [], []
    for number, about in enumerate(settings(params, tags)):
        measures = dict.fromkeys(("participation_ratio", "alternatives"), sharp[number][1])
        described.append({"run_id": str(number), "target_energy": 0.5, **measures, **about})
        place = {key: about[key] for key in ("objective", "variant", "seed", "model", "model_seed")}
        place |= {key: about[key] for key in ("data", "data_seed", "preference")} | {"run_id": str(number)}
        for name, table in tables[number].items():
            before = name.endswith("_pretraining")
            named = {"trajectory": "pretraining" if before else "training", **place}
            rows.append(table.assign(**named, table=name.removesuffix("_pretraining")))
    return pd.concat(rows, ignore_index=True), pd.DataFrame(described)


def _params(objective: str, seed: int) -> dict[str, str]:
    return {
        "objective._target_": f"simulated.{objective.partition('/')[0].upper()}",
        "model._target_": "weightgeom.bases.tiny.Tiny",
        **dict.fromkeys(("model.seed", "data.seed", "seed"), str(seed)),
        "data.preference": "style",
        "intervention.rank1.match": "output",
        **{"model": "tiny", "data": "world", "objective": objective, "training": "short"},
    }


def _normal(generator: torch.Generator) -> float:
    return float(torch.randn((), generator=generator, dtype=torch.float64))


def _gaussian(generator: torch.Generator, *shape: int) -> Float[Tensor, "..."]:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _covariance(generator: torch.Generator) -> Float[Tensor, "d d"]:
    """The second moment of inputs whose directions have the variances 1, 1/2, 1/3, ..."""
    basis = torch.linalg.qr(_gaussian(generator, D, D)).Q
    return basis @ torch.arange(1.0, D + 1, dtype=torch.float64).reciprocal().diag() @ basis.T


def _place(matrix: str, layer: int, step: int = 64) -> dict[str, Any]:
    space = (
        "prediction" if MATRICES[matrix] == "write" else "mlp_input" if matrix == "up" else "attention_input"
    )
    place: dict[str, Any] = {"step": step, "layer": layer, "matrix": matrix, "role": MATRICES[matrix]}
    return {**place, "k": K, "subspace": space}


def _written(truth: Truth, prediction: Subspace, generator: torch.Generator) -> float:
    """The ratio of a write, of the same law whatever trained it."""
    x = _gaussian(generator, ROWS, D)
    if truth == "lora":
        x = _gaussian(generator, ROWS, RANK) @ _gaussian(generator, RANK, D)
    if truth == "seeds":
        x = x + 0.7 * x @ prediction.basis @ prediction.basis.T
    return prediction.explained(x.T @ x) * D / K


def _trained(
    truth: Truth, inputs: Float[Tensor, "d d"], prediction: Subspace, generator: torch.Generator
) -> Iterator[Row]:
    """The ratio of every matrix's update, and the matched level of those that read."""
    space, root = Subspace.top(inputs, K), torch.linalg.cholesky(inputs)
    for layer, (matrix, role) in product(range(LAYERS), MATRICES.items()):
        quantities = {"null_ratio_mean": 1.0, "null_ratio_sd": 0.2, "q_value": 0.5}
        if truth == "lora":
            quantities["adapter_rank"] = float(RANK)
        if role == "write":
            quantities["ratio"] = _written(truth, prediction, generator)
        else:
            x, level = _gaussian(generator, ROWS, D), inputs
            if truth == "seeds":
                x = x @ root.T
            if truth == "lora":
                factor = _gaussian(generator, RANK, D)
                x, level = _gaussian(generator, ROWS, RANK) @ factor, adapter_moment(factor, inputs)
            ratio, matched = (space.explained(moment) * D / K for moment in (x.T @ x, level))
            quantities |= {"ratio": ratio, "crossfit_ratio": ratio}
            quantities |= {"matched_ratio": matched, "crossfit_matched_ratio": matched}
        yield from (row(name, value, n=1, **_place(matrix, layer)) for name, value in quantities.items())


def _pretrained(truth: Truth, prediction: Subspace, generator: torch.Generator) -> Iterator[Row]:
    """Writes of the law of all trainings, and increments without structure."""
    for layer, matrix in product(range(LAYERS), ("o", "down")):
        ratio = _written(truth, prediction, generator)
        yield row("ratio", ratio, n=1, **_place(matrix, layer))
        for step in (8, 16, 32, 64):
            increment = _written("noise", prediction, generator)
            yield row("forward_increment_ratio", increment, n=1, **_place(matrix, layer, step))


def _forecasts(generator: torch.Generator) -> Iterator[Row]:
    """Forecasts and measured ratios without relation."""
    for layer, matrix in product(range(LAYERS), MATRICES):
        for name in ("measured", "forecast", "predicted"):
            yield row(f"{name}_ratio", 3 + _normal(generator), n=1, **_place(matrix, layer))


def _edits(generator: torch.Generator) -> Iterator[Row]:
    """Rank-1 edits whose treatments act as their controls do, but for a training's shared effect."""
    training = 0.3 * _normal(generator)
    for layer, (matrix, kind) in product(range(LAYERS), (("k", "activation"), ("o", "prediction"))):
        place = {"n": 20, "unit": "nats/token", **_place(matrix, layer, 0)}
        effects = (training + 0.5 * _gaussian(generator, 20)).exp().tolist()
        arms = [arm_columns(kind, "0.3"), *(arm_columns("random", "0.3", draw=draw) for draw in range(19))]
        for arm, effect in zip(arms, effects, strict=True):
            yield row("kl_from_unedited", effect, **place, **arm)
        p = sum(effect >= effects[0] for effect in effects) / 20
        place |= {"n": 19, "unit": "1"}
        yield row("kl_from_unedited_p_value", p, **place, **arm_columns(kind, "0.3", against="random"))


def _removals(generator: torch.Generator) -> Iterator[Row]:
    """Surgery whose removals change the margin as those of random subspaces do."""
    change = "preference_margin_change"
    for role in ("read", "write"):
        place: dict[str, Any] = {"step": 64, "role": role, "k": K}
        for kind in ("random_k", "random_energy"):
            effects = (-1 + 0.3 * _gaussian(generator, 20)).tolist()
            arms = [arm_columns(kind, "remove", draw=draw) for draw in range(19)]
            if kind == "random_k":
                arms.append(arm_columns("top", "remove"))
            for arm, effect in zip(arms, effects, strict=False):
                yield row(change, effect, n=20, unit="nats/pair", **place, **arm)
            against = arm_columns("top", "remove", against=kind)
            yield row(f"{change}_p_value", 0.5, n=19, **place, **against)

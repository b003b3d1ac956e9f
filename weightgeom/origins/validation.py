"""Error rates of the origin of an update, in settings that no training had."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool
from numpy import ndarray as Array

from weightgeom.origins.classifier import AXES, Classifier

if TYPE_CHECKING:
    import pandas as pd

ALL = "all three"  # held out together


def held_out(known: "pd.DataFrame", names: Sequence[str], axis: str) -> "pd.DataFrame":
    """Every known update, judged by those that differ from it in `axis`: base, data, rate, step or all three.

    With `all three` they differ in base, data and rate at once, so that each judgement has few to go by.
    Beside the columns of `known`'s place there are `fold`, `best` (the likeliest origin), `answer` ("" where
    there is none), `covered` (whether the true origin fits), `outside` and `distance`.

    Raises:
        ValueError: if `axis` has a single value.
    """
    import pandas as pd

    parts = []
    for fold, tested, taught in _folds(known, axis):
        judged = Classifier.of(known[taught], names).judge(known[tested])
        part = known[tested][["label", *AXES, "step"]].copy()
        part["fold"] = fold
        part["best"] = [
            max(judgement.likelihoods, key=judgement.likelihoods.__getitem__) for judgement in judged
        ]
        part["answer"] = [judgement.answer or "" for judgement in judged]
        part["covered"] = [
            label in judgement.fits for label, judgement in zip(part["label"], judged, strict=True)
        ]
        part["outside"] = [judgement.outside for judgement in judged]
        part["distance"] = [judgement.distance for judgement in judged]
        parts.append(part)
    if not parts:
        raise ValueError(f"{axis} has a single value, so that none of it can be held out")
    return pd.concat(parts, ignore_index=True)


def _folds(
    known: "pd.DataFrame", axis: str
) -> Iterator[tuple[str, Bool[Array, " update"], Bool[Array, " update"]]]:
    """The name of a fold, the updates that are judged, and those that judge."""
    columns = AXES if axis == ALL else (axis,)
    for values in product(*(known[column].unique() for column in columns)):
        same = np.stack([
            (known[column] == value).to_numpy() for column, value in zip(columns, values, strict=True)
        ])  # fmt: skip
        tested, taught = same.all(0), ~same.any(0)
        if tested.any() and taught.any():
            yield " ".join(map(str, values)), tested, taught


def rates(judged: "pd.DataFrame") -> dict[str, float]:
    """The shares of a table of `held_out`, with 95 % intervals of the errors, and the worst fold.

    error: of the likeliest origin. objective_error: of the objective alone, over trainings; whole_error and
    adapter_error: the same of those of the whole network, and of adapters. form_error: of whole, adapter or
    random. answered, answered_error: the share with an answer, and of wrong ones among these. covered,
    outside: the shares whose true origin fits, and that are unlike all known ones. Intervals are Clopper and
    Pearson's over updates; as updates of one base are alike, the worst fold says more: worst, worst_covered.
    """
    error = judged["best"] != judged["label"]
    answered = judged["answer"] != ""
    trained = judged[~judged["label"].str.startswith(("noise", "rotated"))]
    objective = trained["best"].map(objective_of) != trained["label"].map(objective_of)
    adapter = trained["label"].map(form_of) == "lora"
    form = judged["best"].map(form_of) != judged["label"].map(form_of)
    wrong = judged["answer"][answered] != judged["label"][answered]
    summary = {"n": float(len(judged)), "answered": float(answered.mean())}
    for name, values in (
        ("error", error),
        ("objective_error", objective),
        ("whole_error", objective[~adapter]),
        ("adapter_error", objective[adapter]),
        ("form_error", form),
        ("answered_error", wrong),
    ):
        summary[name] = float(values.mean()) if len(values) else float("nan")
        summary[f"{name}_low"], summary[f"{name}_high"] = interval(int(values.sum()), len(values))
    for name, form in (("whole", "whole"), ("adapter", "lora"), ("random", "random")):
        part = judged["label"].map(form_of) == form
        summary[f"{name}_answered"] = float(answered[part].mean())
        summary[f"{name}_answered_error"] = float(wrong[part[answered]].mean())
        summary[f"{name}_covered"] = float(judged["covered"][part].mean())
    summary["worst"] = float(error.groupby(judged["fold"]).mean().max())
    summary["covered"] = float(judged["covered"].mean())
    summary["worst_covered"] = float(judged["covered"].groupby(judged["fold"]).mean().min())
    summary["outside"] = float(judged["outside"].mean())
    return summary


def objective_of(label: str) -> str:
    """`dpo` of `dpo` and `dpo+lora`."""
    return label.removesuffix("+lora")


def form_of(label: str) -> str:
    """`lora`, `whole`, or `random` of an update that no training made."""
    if label.startswith(("noise", "rotated")):
        return "random"
    return "lora" if label.endswith("+lora") else "whole"


def interval(count: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share; (0, 1) of nothing."""
    from scipy.stats import binomtest

    if not n:
        return 0.0, 1.0
    ends = binomtest(count, n).proportion_ci(level, "exact")
    return float(ends.low), float(ends.high)

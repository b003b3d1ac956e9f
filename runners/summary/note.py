"""The text on the pages of a run and of a sweep in MLflow."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportReturnType=false

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from runners.tracking.record import Record

if TYPE_CHECKING:
    import pandas as pd

LOSS = "train/loss"
RATIO = "the relative subspace fraction of the update (1 is chance), mean over layers and matrices"


def run_note(answer: str, warnings: Sequence[str]) -> str:
    """The note of a single run in Markdown: its answer in one sentence, and its warnings."""
    return "\n".join([*([f"**{answer}**"] if answer else []), *(f"\n- warning: {text}" for text in warnings)])


def note(
    sweep: Record,
    children: Sequence[Record],
    table: "pd.DataFrame",
    correlations: Mapping[str, tuple[float, float]],
) -> str:
    """The note in Markdown.

    `table` is the sweep's own, of the runs that finished; `correlations` the rank correlation of the ratio
    with the measured sharpness and its p-value, by role.
    """
    described = sweep.description()
    bad = list(_unfinished(children))
    lines = [
        f"**{described['name']}**: {_runs(len(children))}.",
        f"{len(children) - len(bad)} of {len(children)} finished." + (" The others:" if bad else ""),
        *bad,
    ]
    if len(table):
        table = table if "seed" in table else table.assign(seed="")
        lines += ["", f"After training, {RATIO} ± 2 standard errors over the runs; the last loss:", ""]
        lines += [_result(str(run), part) for run, part in table.groupby("run", sort=False)]
        lines += [*_extremes(table), *_correlated(correlations)]
        lines += ["", "All numbers are in `tables/sweep.csv`, and the figures beside it in `figures/`."]
    if asked := described["params"].get("overrides"):  # last: it may be long, and the page shows the start
        lines += ["", f"Asked for: {asked}"]
    return "\n".join(lines)


def _unfinished(children: Sequence[Record]) -> Iterator[str]:
    for child in children:
        if not (child.directory / "run.json").exists():
            yield f"- {child.directory.parent.name}: never started"
        elif (status := child.status())["status"] != "FINISHED":
            yield f"- {child.description()['name']}: {status['status']}, {status['error']}"


def _result(run: str, part: "pd.DataFrame") -> str:
    """Such as `- **dpo** (2 runs): read 5.12 ± 0.10, write 1.21 ± 0.04; loss 0.412`."""
    ratios = part[part["quantity"] == "ratio"]
    means = [f"{role} {_with_error(_by_seed(rows))}" for role, rows in ratios.groupby("role")]
    losses = part[part["quantity"] == LOSS]["value"]
    numbers = [", ".join(means)] * bool(means) + [f"loss {losses.mean():.3g}"] * bool(len(losses))
    count = len(_by_seed(part))
    return f"- **{run}** ({_runs(count)}): " + ("; ".join(numbers) or "nothing that is summed up here")


def _extremes(table: "pd.DataFrame") -> Iterator[str]:
    """For each role, the runs in which its ratio is lowest and highest."""
    ratios = table[table["quantity"] == "ratio"]
    for role, part in ratios.groupby("role"):
        means = part.groupby("run", sort=False)["value"].mean()
        if len(means) > 1:
            low, high = means.idxmin(), means.idxmax()
            yield (
                f"- The {role} side is lowest in {low} ({means.min():.2f})"
                f" and highest in {high} ({means.max():.2f})."
            )


def _correlated(correlations: Mapping[str, tuple[float, float]]) -> Iterator[str]:
    for role, (rank, p) in correlations.items():
        yield (
            f"- Over all runs, the rank correlation of the {role} ratio with the measured sharpness is "
            f"{rank:.2f} (p = {p:.2g})."
        )


def _by_seed(part: "pd.DataFrame") -> "pd.Series":
    """The mean of `part` for each seed."""
    return part.groupby("seed")["value"].mean()


def _with_error(values: "pd.Series") -> str:
    error = f" ± {2 * values.sem():.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{error}"


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"

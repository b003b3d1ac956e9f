"""Where a study stands to each claim of arXiv:2605.16600, by the rules of `analysis.rules`."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp, log
from typing import TYPE_CHECKING, Any

from weightgeom.analysis.declared import UNDECLARED
from weightgeom.analysis.evidence import Evidence, direction, equivalence, holm, logs, rank_correlation
from weightgeom.analysis.over_seeds import EXPECTED, OWN, Condensed, expectation
from weightgeom.analysis.rules import (
    CLAIMS,
    CONTRADICTED,
    INCONCLUSIVE,
    LEVEL,
    MARGIN,
    OBJECTIVES,
    RUNS,
    SUPPORTED,
    TRAININGS,
    UNTESTED,
    Verdict,
)

if TYPE_CHECKING:
    import pandas as pd

BY_ROLE = (1, 2, 3, 4)  # claims about alignment, which is judged by the role of the objective
CONCENTRATED = {"read": "activation", "write": "prediction"}  # directions of `rank1` by pathway
CHANGE, KL = "preference_margin_change", "kl_from_unedited"


@dataclass(frozen=True)
class Tested:
    """One claim at one setting: the finding, and the evidence, None where it is not tested."""

    setting: str
    side: str  # read, write, or ""
    finding: str
    evidence: Evidence | None = None
    unit: str = "1"
    n: int = 0


def verdicts(condensed: Condensed, runs: "pd.DataFrame") -> "pd.DataFrame":
    """A row for every claim and setting that tests it, or one that says it is not tested.

    Columns: `claim setting side verdict finding value low high unit n p_for p_against statement rule`. The
    p-values are Holm's, over all tests of the study.
    """
    import pandas as pd

    about = runs.set_index("run_id")
    ended = condensed.ended.assign(
        kind=condensed.ended["run_id"]
        .map(dict(zip(runs["run_id"], _roles(runs), strict=True)))
        .astype(object),
        design=condensed.ended["run_id"].map(about["design"]),
    )
    ended.loc[ended["trajectory"] == "pretraining", "kind"] = "pretraining"
    tests: tuple[Callable[[], Iterator[Tested]], ...] = (
        lambda: _reads(ended),
        lambda: _whatever_the_objective(ended),
        lambda: _hardly_writes(ended),
        lambda: _writes_less(ended),
        lambda: _pretraining_writes(condensed, ended),
        lambda: _graded(condensed, about),
        lambda: _mechanism(condensed),
        lambda: _edits(condensed),
        lambda: _surgery(condensed),
    )
    lines: list[tuple[Any, Tested]] = []
    for claim, test in zip(CLAIMS, tests, strict=True):
        tested = [*test(), *(_left_out(condensed, runs) if claim.number in BY_ROLE else ())]
        if not tested:
            tested = [Tested("", "", f"no run measured it: {claim.test}")]
        lines += [(claim, line) for line in tested]
    evidence = [line.evidence for _, line in lines if line.evidence is not None]
    sides = (holm([result.p_for for result in evidence]), holm([result.p_against for result in evidence]))
    adjusted = iter(zip(*sides, strict=True))
    rows = [
        {
            "claim": claim.number, "setting": line.setting, "side": line.side,
            **_judged(line, *((None, None) if line.evidence is None else next(adjusted))),
            "statement": claim.statement, "rule": claim.rule,
        }
        for claim, line in lines
    ]  # fmt: skip
    return pd.DataFrame(rows).astype(dict.fromkeys(("value", "low", "high", "p_for", "p_against"), "Float64"))


def _judged(line: Tested, p_for: float | None, p_against: float | None) -> dict[str, Any]:
    numbers = dict.fromkeys(("value", "low", "high"))
    verdict: Verdict = UNTESTED
    finding, n = line.finding, line.n
    if line.evidence is not None and p_for is not None and p_against is not None:
        numbers = {name: getattr(line.evidence, name) for name in numbers}
        verdict = SUPPORTED if p_for <= LEVEL else CONTRADICTED if p_against <= LEVEL else INCONCLUSIVE
        finding += f"; p {p_for:.2g} for the claim, {p_against:.2g} against it (Holm)"
        n = n or line.evidence.n
    return {
        **{"verdict": verdict, "finding": finding, **numbers, "unit": line.unit, "n": n},
        **{"p_for": p_for, "p_against": p_against},
    }


def _left_out(condensed: Condensed, runs: "pd.DataFrame") -> Iterator[Tested]:
    """A line for every setting of which nothing says how it was trained."""
    about = runs.set_index("run_id")
    unknown = about[(about["role"] == UNDECLARED) | (about["pair"] & (about["role"] == ""))]
    ended = condensed.ended[condensed.ended["run_id"].isin(unknown.index)]
    ended = ended[ended["trajectory"] == "training"]
    for setting, members in ended.groupby("setting", sort=False)["run_id"].unique().items():
        finding = (
            f"left out: the objective {unknown.loc[members[0], 'objective_class']} declares no role, and"
            " nothing says whether it contrasts responses; give it the properties role and of_text, and run"
            " it again"
        )
        if unknown.loc[members[0], "pair"]:
            finding = (
                "left out: nothing says what trained the second checkpoint; run it again with"
                " model.stage=dpo, or the name of what did"
            )
        yield Tested(str(setting), "", finding, n=len(members))


def _roles(runs: "pd.DataFrame") -> list[str]:
    return [
        "alignment" if aligns else "entropy" if entropy else ""
        for aligns, entropy in zip(runs["aligns"], runs["entropy"], strict=True)
    ]


def _settings(ended: "pd.DataFrame", kind: str) -> list[str]:
    return list(dict.fromkeys(ended.loc[ended["kind"] == kind, "setting"]))


def _ratio(evidence: Evidence) -> Evidence:
    """From logarithms back to ratios."""
    ends = (exp(min(700.0, value)) for value in (evidence.value, evidence.low, evidence.high))
    return Evidence(*ends, evidence.n, evidence.p_for, evidence.p_against)


def _tested(
    setting: str, side: str, what: str, values: "pd.Series", test: Callable[[list[float]], Evidence | None],
    unit: str = "training",
) -> Tested:  # fmt: skip
    """A test of ratios, one for each training (or base), on their logarithms."""
    values = values.drop_duplicates()  # copies of a training are no further evidence
    n = len(values)
    if n < TRAININGS or (evidence := test(logs(values))) is None:
        mean = float(values.mean()) if n else float("nan")
        return Tested(
            setting, side, f"{what} {mean:.2f} in {_many(n, unit)}, where a test needs {TRAININGS}", n=n
        )
    evidence = _ratio(evidence)
    bases = len({str(replicate).partition("/")[2] for replicate in values.index})
    of = _many(n, unit) + (f" on {_many(bases, 'base')}" if unit == "training" else "")
    finding = f"{what} {evidence.value:.2f} [{evidence.low:.2f}, {evidence.high:.2f}], {of}"
    return Tested(setting, side, finding, evidence)


def _of_q_and_k(ended: "pd.DataFrame", setting: str) -> "pd.DataFrame":
    """Means over q and k of every training of a setting, by replicate."""
    rows = ended[(ended["setting"] == setting) & ended["matrix"].isin(["q", "k"])]
    columns = ["ratio", "matched_ratio", "crossfit_ratio", "crossfit_matched_ratio"]
    return rows.groupby("replicate")[columns].mean()


def _reads(ended: "pd.DataFrame") -> Iterator[Tested]:
    for setting in _settings(ended, "alignment"):
        values = _of_q_and_k(ended, setting)["ratio"]
        if not len(values):
            yield Tested(setting, "read", "neither q nor k moved")
            continue
        whole = ended[(ended["setting"] == setting) & (ended["role"] == "read") & (ended["matrix"] != "")]
        if (rank := whole["adapter_rank"].max()) > 0:
            finding = (
                f"an adapter of rank {rank:.0f}: its reads lie in the row space of A, which is random at"
                " first; claim 2 compares with that row space"
            )
            yield Tested(setting, "read", finding, n=len(values))
            continue
        by_matrix = ", ".join(f"{name} {part.mean():.2f}" for name, part in whole.groupby("matrix")["ratio"])
        line = _tested(
            setting, "read", "ratio of q and k", values, lambda sample: direction(sample, log(MARGIN))
        )
        yield Tested(line.setting, line.side, f"{line.finding}; {by_matrix}", line.evidence, n=line.n)


def _whatever_the_objective(ended: "pd.DataFrame") -> Iterator[Tested]:
    def equal(sample: list[float]) -> Evidence | None:
        return equivalence(sample, log(MARGIN))

    for setting in _settings(ended, "alignment"):
        means = _of_q_and_k(ended, setting)
        crossfit = (means["crossfit_ratio"] / means["crossfit_matched_ratio"]).dropna()
        values = crossfit if len(crossfit) else (means["ratio"] / means["matched_ratio"]).dropna()
        if len(values):
            rank = ended[ended["setting"] == setting]["adapter_rank"].max()
            of = f" of an adapter of rank {rank:.0f}" if rank > 0 else ""
            what = f"ratio of q and k over the matched level{of}"
            yield _tested(f"{setting} against its inputs", "read", what, values, equal)
        for other in _peers(ended, setting, "entropy"):
            if not _alike_adapters(ended, setting, other):
                continue
            both = means.merge(
                _of_q_and_k(ended, other), left_index=True, right_index=True, suffixes=("", "_other")
            )
            if len(both):
                what = f"ratio of q and k over that of {other}"
                values = both["ratio"] / both["ratio_other"]
                yield _tested(f"{setting} against {other}", "read", what, values, equal)


def _alike_adapters(ended: "pd.DataFrame", *settings: str) -> bool:
    """Whether all are adapters of one rank, or none is: the reads of others cannot be compared."""
    ranks = [ended[ended["setting"] == setting]["adapter_rank"].fillna(0).max() for setting in settings]
    return len(set(ranks)) == 1


def _hardly_writes(ended: "pd.DataFrame") -> Iterator[Tested]:
    writes = ended[(ended["matrix"] == "") & (ended["role"] == "write")]
    for setting in _settings(ended, "alignment"):
        rows = writes[writes["setting"] == setting]
        if not len(rows):
            yield Tested(setting, "write", "neither o nor down moved")
            continue
        values = rows.groupby("replicate")["ratio"].mean()
        line = _tested(
            setting, "write", "write ratio", values, lambda sample: equivalence(sample, log(MARGIN))
        )
        null = (
            f"one training's null is {rows['null_mean'].mean():.2f} ± {2 * rows['null_sd'].mean():.2f} (2 sd)"
        )
        yield Tested(line.setting, line.side, f"{line.finding}; {null}", line.evidence, n=line.n)


def _writes_less(ended: "pd.DataFrame") -> Iterator[Tested]:
    writes = ended[(ended["matrix"] == "") & (ended["role"] == "write")]

    def less(sample: list[float]) -> Evidence | None:
        return direction(sample, below=True)

    for setting in _settings(writes, "alignment"):
        own = writes[writes["setting"] == setting]
        for kind, key, unit in (("pretraining", "base", "base"), ("entropy", "replicate", "training")):
            for other in _peers(writes, setting, kind):
                rows = writes[writes["setting"] == other]
                both = own.merge(rows[[key, "ratio"]], on=key, suffixes=("", "_other"))
                if not len(both):
                    continue
                values = (both["ratio"] / both["ratio_other"]).groupby(both[key]).mean()
                what = f"write ratio over that of {other}"
                yield _tested(f"{setting} against {other}", "write", what, values, less, unit)


def _peers(ended: "pd.DataFrame", setting: str, kind: str) -> list[str]:
    """The settings that one may be compared with: of its design, and its data and preference.

    Where some share its variant too, such as the steps of the training, only those.
    """
    place = ended[ended["setting"] == setting].iloc[0]
    peers = ended[(ended["kind"] == kind) & (ended["design"] == place["design"])]
    if kind == "pretraining":
        return list(dict.fromkeys(peers["setting"]))
    peers = peers[peers["preference"] == place["preference"]]
    alike = peers[peers["variant"] == place["variant"]]
    return list(dict.fromkeys((alike if len(alike) else peers)["setting"]))


def _pretraining_writes(condensed: Condensed, ended: "pd.DataFrame") -> Iterator[Tested]:
    for setting in _settings(ended, "pretraining"):
        rows = condensed.increments[condensed.increments["setting"] == setting]
        if len(rows):
            values = rows.groupby("base")["ratio"].mean()
            what = "write ratio of the increments"
            yield _tested(
                setting, "write", what, values, lambda sample: direction(sample, log(MARGIN)), "base"
            )


def _graded(condensed: Condensed, about: "pd.DataFrame") -> Iterator[Tested]:
    writes = condensed.graded[condensed.graded["role"] == "write"]
    design = writes["run_id"].map(about["design"])
    for _, part in writes.groupby([design, writes["preference"]], sort=False):
        if not part["objective"].str.startswith("graded").any():
            continue
        objectives, first = part["run"].nunique(), part.iloc[0]
        setting = " · ".join(name for name in first[["model", "data", "preference"]] if name)
        if objectives < OBJECTIVES:
            finding = f"{_many(objectives, 'objective')}, where the order of {OBJECTIVES} is tested"
            yield Tested(setting, "write", finding, n=objectives)
            continue
        rank, p = rank_correlation(part)
        evidence = Evidence(
            rank, float("nan"), float("nan"), objectives, *((p, 1.0) if rank > 0 else (1.0, p))
        )
        finding = (
            f"rank correlation of write ratio and {first['measure']} {rank:.2f} over {objectives} objectives"
            f" in {_many(len(part), 'training')}"
        )
        yield Tested(setting, "write", finding, evidence)


def _mechanism(condensed: Condensed) -> Iterator[Tested]:
    keys = ["design", "role"]
    for (_, role), part in condensed.mechanism.groupby(keys, sort=False):
        setting = f"{part['model'].iloc[0]} · {part['data'].iloc[0]}"
        made = {name: expectation(part, name) for name in EXPECTED}
        if part[f"{OWN}_ratio"].isna().all():
            continue
        first, runs = expectation(part, OWN), part["run_id"].nunique()
        if first is None:
            finding = f"{_many(runs, 'training')}, where a correlation over trainings needs {RUNS}"
            yield Tested(setting, role, finding, n=runs)
            continue
        others = [
            f"{name} {correlation.value:.2f} [{correlation.low:.2f}, {correlation.high:.2f}]"
            for name, correlation in reversed(made.items())
            if correlation is not None
        ]
        finding = (
            f"correlation of the optimizer's forecast with the measured ratio {first.value:.2f}"
            f" [{first.low:.2f}, {first.high:.2f}]; of {', '.join(others)}; {len(part)} points of"
            f" {_many(runs, 'training')}"
        )
        yield Tested(setting, role, finding, first)


def _edits(condensed: Condensed) -> Iterator[Tested]:
    rank1 = condensed.rank1
    if not len(rank1):
        return
    strength = rank1["dose"].astype(float)
    chosen = strength == strength.groupby(rank1["run_id"]).transform("max")
    chosen &= (rank1["against"] == "random") & (rank1["treatment"] == rank1["role"].map(CONCENTRATED))
    chosen &= rank1["quantity"] == KL
    for (setting, role), part in rank1[chosen].groupby(["setting", "role"], sort=False):
        positive = part[(part["effect"] > 0) & (part["controls"] > 0)]
        over = positive.assign(
            over=[log(a / b) for a, b in zip(positive["effect"], positive["controls"], strict=True)]
        )
        values = over.groupby("replicate")["over"].mean().map(exp)
        beaten, places = int((part["p_value"] <= LEVEL).sum()), len(part)
        matrices = ", ".join(dict.fromkeys(part["matrix"]))
        summary = (
            f"p ≤ {LEVEL} in {beaten} of {_many(places, 'place')} ({matrices}); median KL"
            f" {part['effect'].median():.2g} against {part['controls'].median():.2g} nats/token"
        )
        if len(
            left := condensed.least[
                (condensed.least["setting"] == setting) & (condensed.least["role"] == role)
            ]
        ):
            summary += f"; the bottom direction does least in {int(left['least'].sum())} of {len(left)}"
        if (part["match"] != "output").any():
            finding = f"edits of equal Frobenius norm are not judged (match=output is): {summary}"
            yield Tested(str(setting), str(role), finding, n=part["replicate"].nunique())
            continue
        line = _tested(str(setting), str(role), "KL over the median random edit's", values, direction)
        yield Tested(line.setting, line.side, f"{line.finding}; {summary}", line.evidence, n=line.n)


def _surgery(condensed: Condensed) -> Iterator[Tested]:
    surgery = condensed.surgery
    if not len(surgery):
        return
    chosen = (surgery["quantity"] == CHANGE) & (surgery["dose"] == "remove")
    keys = ["setting", "role", "matrix", "against"]
    for (setting, role, matrix, against), part in surgery[chosen].groupby(keys, sort=False):
        setting += f" ({matrix})" if matrix else ""
        what = {"random_k": "the same dimension", "random_energy": "the same removed energy"}.get(
            against, against
        )
        values = (part["effect"] - part["controls"]).groupby(part["replicate"]).mean().drop_duplicates()
        by_k = [
            f"k = {int(k)}: {rows['effect'].mean():+.2g} against {rows['controls'].mean():+.2g}"
            f" (p = {rows['p_value'].max():.2g})"
            for k, rows in part.groupby("k")
        ]
        against_controls = f"against subspaces of {what}; {'; '.join(by_k)} nats/pair"
        evidence = direction(list(values), below=True)
        if evidence is None:
            finding = f"{_many(len(values), 'training')}, where a test needs {TRAININGS}, {against_controls}"
            yield Tested(setting, role, finding, unit="nats/pair", n=len(values))
            continue
        finding = (
            f"change of the margin less the controls' {evidence.value:+.2g} [{evidence.low:+.2g},"
            f" {evidence.high:+.2g}], {_many(len(values), 'training')}, {against_controls}"
        )
        yield Tested(setting, role, finding, evidence, unit="nats/pair")


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

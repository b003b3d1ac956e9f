"""Where a study stands to each claim of arXiv:2605.16600: agrees, disagrees or not tested here, by a rule.

The rules are ours, and are printed beside their verdicts. They judge the direction of a claim, never a
number of the paper.
"""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from weightgeom.analysis.declared import UNDECLARED
from weightgeom.analysis.over_seeds import LEVEL, Condensed, half_width, rank_correlation

if TYPE_CHECKING:
    import pandas as pd


BY_ROLE = (1, 2, 3)  # claims about alignment, which is judged by the role of the objective
AGREES, DISAGREES, UNTESTED = "agrees", "disagrees", "not tested here"
CONCENTRATED = {"read": "activation", "write": "prediction"}  # directions of `rank1` by pathway
MARGIN, KL = "preference_margin_change", "kl_from_unedited"


@dataclass(frozen=True)
class Verdict:
    """One claim at one setting, with the number that decides and what it is (`finding`)."""

    claim: int
    setting: str
    side: str  # read, write, or ""
    verdict: str
    finding: str
    value: float | None = None
    low: float | None = None  # ends of a 95 % interval
    high: float | None = None
    unit: str = "1"
    n: int = 0


def verdicts(found: Condensed, runs: "pd.DataFrame") -> "pd.DataFrame":
    """A row for every claim and setting that tests it, or one that says it is not tested here."""
    import pandas as pd

    roles = dict(zip(runs["run_id"], _roles(runs), strict=True))
    ended = found.ended.assign(kind=found.ended["run_id"].map(roles).astype(object))
    ended.loc[ended["trajectory"] == "pretraining", "kind"] = "pretraining"
    tests: tuple[Callable[[], Iterator[Verdict]], ...] = (
        lambda: _reads(found, ended),
        lambda: _hardly_writes(found, ended),
        lambda: _pretraining_writes(ended),
        lambda: _graded(found),
        lambda: _mechanism(found),
        lambda: _edits(found),
        lambda: _surgery(found),
    )
    rows = []
    for claim, test in zip(CLAIMS, tests, strict=True):
        lines = [*test(), *(_left_out(found, runs, claim.number) if claim.number in BY_ROLE else ())]
        if not lines:
            lines = [Verdict(claim.number, "", "", UNTESTED, f"no run measured it: {claim.test}")]
        rows += [{**asdict(line), "statement": claim.statement, "rule": claim.rule} for line in lines]
    return pd.DataFrame(rows).astype(dict.fromkeys(("value", "low", "high"), "Float64"))


def _left_out(found: Condensed, runs: "pd.DataFrame", claim: int) -> Iterator[Verdict]:
    """A line for every setting whose objective has declared no role."""
    undeclared = runs[runs["role"] == UNDECLARED].set_index("run_id")["objective_class"]
    ended = found.ended[found.ended["run_id"].isin(undeclared.index)]
    ended = ended[ended["trajectory"] == "training"]
    for setting, members in ended.groupby("setting", sort=False)["run_id"].unique().items():
        finding = (
            f"left out: the objective {undeclared[members[0]]} declares no role, and nothing says whether it"
            " contrasts responses; give it the properties role and of_text, and run it again"
        )
        yield Verdict(claim, str(setting), "", UNTESTED, finding, n=len(members))


def _roles(runs: "pd.DataFrame") -> list[str]:
    return [
        "alignment" if aligns else "entropy" if entropy else ""
        for aligns, entropy in zip(runs["aligns"], runs["entropy"], strict=True)
    ]


def _settings(ended: "pd.DataFrame", kind: str) -> list[str]:
    return list(dict.fromkeys(ended.loc[ended["kind"] == kind, "setting"]))


def _reads(found: Condensed, ended: "pd.DataFrame") -> Iterator[Verdict]:
    for setting in _settings(ended, "alignment"):
        table = found.asymmetry[(found.asymmetry["setting"] == setting) & (found.asymmetry["role"] == "read")]
        table = table[table["matrix"] != ""].set_index("matrix")
        both = [matrix for matrix in ("q", "k") if matrix in table.index]
        if not both:
            yield Verdict(1, setting, "read", UNTESTED, "neither q nor k moved")
            continue
        runs = ended[(ended["setting"] == setting) & ended["matrix"].isin(both)]
        value, low, high = _mean(runs.groupby("replicate")["ratio"].mean())
        passed = all(
            row["ratio"] > row["null_mean"] + 2 * row["null_sd"] for _, row in table.loc[both].iterrows()
        )
        told = [f"{matrix} {_ratio(table.loc[matrix])}" for matrix in [*both, *table.index.difference(both)]]
        null = 2 * table.loc[both, "null_sd"].max()
        beyond = table.loc[both, "beyond"].mean()
        finding = (
            f"ratios {', '.join(told)}; null 1 ± {null:.2f} (2 sd); {beyond:.0%} of the layers of"
            f" {' and '.join(both)} have q ≤ {LEVEL}"
        )
        yield Verdict(
            1, setting, "read", _said(bool(passed)), finding, value, low, high, n=int(table["runs"].max())
        )


def _hardly_writes(found: Condensed, ended: "pd.DataFrame") -> Iterator[Verdict]:
    pathways = found.asymmetry[(found.asymmetry["matrix"] == "") & (found.asymmetry["role"] == "write")]
    for setting in _settings(ended, "alignment"):
        if not (own := pathways[pathways["setting"] == setting]).shape[0]:
            yield Verdict(2, setting, "write", UNTESTED, "neither o nor down moved")
            continue
        row = own.iloc[0]
        top = row["null_mean"] + 2 * row["null_sd"]
        finding = f"write ratio {_ratio(row)}; the null reaches {top:.2f} (2 sd)"
        passed = row["ratio"] <= top
        reference = _reference(pathways, ended, row)
        if reference is not None:
            passed = passed or row["ratio"] < reference["ratio"] / 2
            share = row["ratio"] / reference["ratio"]
            finding += f"; {share:.0%} of that of {reference['setting']} ({reference['ratio']:.2f})"
        yield Verdict(2, setting, "write", _said(bool(passed)), finding, *_numbers(row), n=int(row["runs"]))


def _reference(pathways: "pd.DataFrame", ended: "pd.DataFrame", row: "pd.Series") -> "pd.Series | None":
    """Pretraining's write ratio at the same model and data, else the highest of cross-entropy's."""
    same = (pathways["model"] == row["model"]) & (pathways["data"] == row["data"])
    for kind in ("pretraining", "entropy"):
        rows = pathways[same & pathways["setting"].isin(_settings(ended, kind))]
        rows = rows if kind == "pretraining" else rows[rows["preference"] == row["preference"]]
        if len(rows):
            return rows.loc[rows["ratio"].idxmax()]
    return None


def _pretraining_writes(ended: "pd.DataFrame") -> Iterator[Verdict]:
    writes = ended[(ended["matrix"] == "") & (ended["role"] == "write")]
    for setting in _settings(writes, "alignment"):
        own = writes[writes["setting"] == setting]
        place = own.iloc[0]
        peers = writes[(writes["model"] == place["model"]) & (writes["data"] == place["data"])]
        compared = [(name, "base") for name in _settings(peers, "pretraining")]
        alike = peers[peers["preference"] == place["preference"]]
        compared += [(name, "replicate") for name in _settings(alike, "entropy")]
        for other, key in compared:
            pairs = own.merge(
                peers.loc[peers["setting"] == other, [key, "ratio"]], on=key, suffixes=("", "_other")
            )
            if not len(pairs):
                continue
            difference = pairs["ratio_other"] - pairs["ratio"]
            value, low, high = _mean(difference)
            finding = (
                f"{other} writes {pairs['ratio_other'].mean():.2f}, {setting} {pairs['ratio'].mean():.2f}:"
                f" difference {value:+.2f}{_interval(low, high)}, positive in {(difference > 0).sum()} of"
                f" {_many(len(pairs), 'run')}"
            )
            name = f"{setting} against {other}"
            yield Verdict(
                3, name, "write", _said(bool((difference > 0).all())), finding, value, low, high, n=len(pairs)
            )


def _graded(found: Condensed) -> Iterator[Verdict]:
    writes = found.graded[found.graded["role"] == "write"]
    for (model, data, preference), part in writes.groupby(["model", "data", "preference"]):
        objectives = part["run"].nunique()
        if not part["objective"].str.startswith("graded").any():
            continue
        setting = " · ".join(name for name in (model, data, preference) if name)
        if objectives < 3 or len(part) < 5:
            finding = f"{_many(objectives, 'objective')} in {_many(len(part), 'run')} are too few to rank"
            yield Verdict(4, setting, "write", UNTESTED, finding, n=len(part))
            continue
        rank, p = rank_correlation(part)
        means = part.groupby("run")[["sharpness", "ratio"]].mean()
        over, _ = rank_correlation(means)
        finding = (
            f"rank correlation of write ratio and participation ratio {rank:.2f}"
            f" (p = {p:.2g}) over {len(part)} runs of {objectives} objectives;"
            f" {over:.2f} over the objectives' means"
        )
        passed = rank > 0 and p <= LEVEL
        yield Verdict(4, setting, "write", _said(bool(passed)), finding, rank, n=len(part))


def _mechanism(found: Condensed) -> Iterator[Verdict]:
    for (model, data, role), part in found.correlations.groupby(["model", "data", "role"]):
        row = part.set_index("expected")
        if "forecast" not in row.index:
            continue
        told = [
            f"{name} {one['correlation']:.2f}{_interval(one['low'], one['high'])}"
            for name, one in row.iloc[::-1].iterrows()
        ]
        first = row.loc["forecast"]
        finding = (
            f"correlation with the measured ratio: {', '.join(told)}; {int(first['n'])} points of"
            f" {_many(int(first['runs']), 'run')}"
        )
        numbers = (float(first[name]) for name in ("correlation", "low", "high"))
        yield Verdict(
            5, f"{model} · {data}", role, _said(bool(first["low"] > 0)), finding, *numbers, n=int(first["n"])
        )


def _edits(found: Condensed) -> Iterator[Verdict]:
    rank1 = found.rank1
    if len(rank1):
        strength = rank1["dose"].astype(float)
        chosen = strength == strength.groupby(rank1["run_id"]).transform("max")
        chosen &= (rank1["against"] == "random") & (rank1["treatment"] == rank1["role"].map(CONCENTRATED))
        for (setting, role), part in rank1[chosen].groupby(["setting", "role"], sort=False):
            by_effect = {
                effect: (int((one["p_value"] <= LEVEL).sum()), len(one))
                for effect, one in part.groupby("quantity", sort=False)
            }
            if KL not in by_effect:
                continue
            beaten, places = by_effect[KL]
            kl = part[part["quantity"] == KL]
            others = [f"{_plain(name)} {a} of {b}" for name, (a, b) in by_effect.items() if name != KL]
            matrices = ", ".join(dict.fromkeys(kl["matrix"]))
            finding = (
                f"p ≤ {LEVEL} in {beaten} of {_many(places, 'place')} ({matrices});"
                f" median KL {kl['effect'].median():.2g} against {kl['controls'].median():.2g} nats/token;"
                f" by {', '.join(others)}"
            )
            passed = beaten > places / 2
            yield Verdict(6, setting, role, _said(bool(passed)), finding, beaten / places, n=places)
    for (setting, role), part in found.least.groupby(["setting", "role"], sort=False):
        least, places = int(part["least"].sum()), len(part)
        finding = f"the bottom direction does least in {least} of {_many(places, 'place')}"
        yield Verdict(6, setting, role, _said(bool(least > places / 2)), finding, least / places, n=places)


def _surgery(found: Condensed) -> Iterator[Verdict]:
    surgery = found.surgery
    if not len(surgery):
        return
    chosen = (surgery["quantity"] == MARGIN) & (surgery["dose"] == "remove")
    keys = ["setting", "role", "matrix", "against"]
    for (setting, role, matrix, against), part in surgery[chosen].groupby(keys, sort=False):
        setting += f" ({matrix})" if matrix else ""
        what = {"random_k": "the same dimension", "random_energy": "the same removed energy"}.get(
            against, against
        )
        if 1 / (1 + part["n"].max()) > LEVEL:
            finding = f"{part['n'].max()} random subspaces of {what} cannot give p ≤ {LEVEL}"
            yield Verdict(7, setting, role, UNTESTED, finding, n=len(part))
            continue
        falls = (part["effect"] < part["controls"]) & (part["p_value"] <= LEVEL)
        told = [
            f"k = {int(k)}: {one['effect'].mean():+.2g} against {one['controls'].mean():+.2g}"
            f" (p = {one['p_value'].max():.2g})"
            for k, one in part.groupby("k")
        ]
        finding = (
            f"margin falls further than by subspaces of {what} in {int(falls.sum())} of"
            f" {_many(len(part), 'removal')}; {'; '.join(told)} nats/pair"
        )
        yield Verdict(
            7, setting, role, _said(bool(falls.mean() > 0.5)), finding, float(falls.mean()), n=len(part)
        )


def _said(passed: bool) -> str:
    return AGREES if passed else DISAGREES


def _mean(values: "pd.Series") -> tuple[float, float | None, float | None]:
    """The mean of a number of every run, and the ends of its 95 % interval over them."""
    mean, half = float(values.mean()), half_width(float(values.std()), len(values))
    return (mean, None, None) if half is None else (mean, mean - half, mean + half)


def _numbers(row: "pd.Series") -> tuple[float | None, ...]:
    import pandas as pd

    return tuple(None if pd.isna(row[name]) else float(row[name]) for name in ("ratio", "low", "high"))


def _ratio(row: "pd.Series") -> str:
    value, low, high = _numbers(row)
    return f"{value:.2f}{_interval(low, high)}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _plain(effect: str) -> str:
    return effect.removesuffix("_change").replace("_", " ")


@dataclass(frozen=True)
class Claim:
    """What the paper says, when we say that a study agrees with it, and what to run to test it."""

    number: int
    statement: str
    rule: str
    test: str


CLAIMS = (
    Claim(
        1,
        "Alignment's updates concentrate in the read pathway: in what q and k (and v and up) read.",
        "Agrees if the ratio of q and that of k, each the mean over layers and seeds, lie more than two of"
        " the rotation null's standard deviations above its mean.",
        "weightgeom run objective=dpo",
    ),
    Claim(
        2,
        "In the write pathway (o, down) they stay near-isotropic against the prediction subspace.",
        "Agrees if the mean ratio over o, down, layers and seeds lies no more than two of the null's standard"
        " deviations above its mean, or below half of the ratio of pretraining (of cross-entropy, where"
        " pretraining was not measured).",
        "weightgeom run objective=dpo",
    ),
    Claim(
        3,
        "Cross-entropy pretraining writes: its updates concentrate in the prediction subspace more than"
        " alignment's.",
        "Agrees if the write ratio of pretraining exceeds that of the alignment in every run; likewise for"
        " other cross-entropy trainings on the same data, seed by seed.",
        "weightgeom run objective=dpo,ce seed=0,1,2 -m",
    ),
    Claim(
        4,
        "The more contrastive the objective (the graded control), the less it writes.",
        "Agrees if over runs the write ratio rises with the measured participation ratio of the logit"
        " gradient (1: sharp, all of it on one token; more: spread over so many) by Spearman's rank"
        " correlation, p ≤ 0.05. Tested with three objectives and five runs or more.",
        "weightgeom run experiment=graded_control -m",
    ),
    Claim(
        5,
        "The cause is the accumulation of anisotropic gradients: what the base's moments lead to expect is"
        " what is measured.",
        "Agrees if the 95 % interval of Pearson's correlation between the forecast of the base's mean"
        " gradient and the measured ratio, over layers, matrices and runs, lies above 0.",
        "weightgeom run 'probe=[rsf,behaviour,moments]'",
    ),
    Claim(
        6,
        "Rank-1 edits along the concentrated direction do more than matched random ones, and those along"
        " the bottom direction do least.",
        "Agrees if, at the largest strength, more than half of the places (layer by matrix by run) have"
        " p ≤ 0.05 against random directions by KL from the unedited model; for the bottom direction, if it"
        " does less than every other arm in more than half of the places.",
        "weightgeom run experiment=causal",
    ),
    Claim(
        7,
        "The behaviour lies in the concentrated part of the update: to remove it undoes more than to remove"
        " random parts.",
        "Agrees if, in more than half of the removals (dimension k by run), the preference margin falls"
        " further than under the median control and p ≤ 0.05; against random subspaces of the same dimension,"
        " and of the same removed energy.",
        "weightgeom run experiment=causal",
    ),
)

"""Published claims about weight updates: the contract of a claim, the rules they share, and the verdicts."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportReturnType=false, reportIndexIssue=false

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isnan, sqrt
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

from weightgeom.analysis.chain import BETWEEN, SINGLE, STAGES
from weightgeom.analysis.declared import plain_name
from weightgeom.analysis.rules import CONTRADICTED, MARGIN, SUPPORTED
from weightgeom.analysis.settings import TRAINED_BY
from weightgeom.analysis.trainings import ALIGNMENT, CONTRAST, LIKELIHOOD, kind_of
from weightgeom.table import whole_matrices

if TYPE_CHECKING:
    import pandas as pd

REFEREE = "referee"  # the table of all verdicts of a run
EXPLAINED, UNTESTABLE = "explained by its null", "not testable here"
Verdict = Literal["supported", "contradicted", "explained by its null", "not testable here"]
VERDICTS: tuple[Verdict, ...] = (SUPPORTED, CONTRADICTED, EXPLAINED, UNTESTABLE)
SDS = 2  # standard deviations of the null within which a mean is that of the null
PART = 0.5  # of the distance to a published level; where the null covers more, it explains the rest
KINDS = {CONTRAST: "preferences or rewards", LIKELIHOOD: "likelihood"}  # of trainings, as messages say it
# Two rules that claims share, to be put into the text of their own.
BEYOND_A_LEVEL = (
    "contradicted if the mean over matrices is not {side} {level}; explained by its null if the null's mean"
    f" covers more than {PART:.0%} of the distance to it, or the mean is within {SDS} standard deviations of"
    " the null's; supported otherwise"
)
BEYOND_A_SHARE = (
    f"{BEYOND_A_LEVEL}, or if the mean covers {PART:.0%} of the way from the null's mean to the end of the"
    " range, {end}"
)
BEYOND_THE_NULL = (
    f"supported if the mean over matrices is {{side}} the null's by a factor of {MARGIN} and by more than"
    f" {SDS} of its standard deviations; contradicted if it is as far on the other side; explained by its"
    " null otherwise"
)
RULES = (  # of the referee as a whole
    "A verdict is about one update: its numbers are means over matrices, and the spread is that of the null,"
    " not of trainings. The rules are ours and were fixed before any data. Explained by its null: the"
    " published statement holds, but an update without the structure that it is taken for would show as much."
    " Not testable here: the update is of another kind of training, or the rows are missing."
)
Side = Literal["above", "below"]
MEMBERS = ("paper", "statement", "published", "about", "needs", "rule", "judged")  # of a claim


@dataclass(frozen=True)
class Finding:
    """A verdict with the numbers behind it: `ours`, and mean and standard deviation of its null.

    `n` is the number of matrices (or layers), and `detail` the reason of a verdict in words.
    """

    verdict: Verdict
    quantity: str = ""
    ours: float | None = None
    null: float | None = None
    null_sd: float | None = None
    unit: str = "1"
    n: int = 0
    detail: str = ""


@dataclass(frozen=True, eq=False)
class Update:
    """The tables of one update: of a training, of a pair, or of a chain's stage against the one before it.

    `trained_by` is the objective or stage, such as dpo, "" where nothing names it; `kind` is contrast (of
    preferences or rewards), likelihood, other, or "" where it is unknown. `params` are those of the run, by
    dotted keys such as `probe.sparsity.alpha`.
    """

    name: str
    tables: "Mapping[str, pd.DataFrame]"
    step: int
    trained_by: str = ""
    kind: str = ""
    params: Mapping[str, object] | None = None

    def param(self, key: str, default: float) -> float:
        """A number among the parameters of the run."""
        value = (self.params or {}).get(key)
        return float(value) if isinstance(value, int | float) else default

    def values(self, probe: str, quantity: str, of: Sequence[str] = ()) -> "pd.Series":
        """The quantity of whole matrices at the update's last step, by `layer`, `matrix` and `expert`.

        `of` are the kinds of matrix, such as q; all by default. Of several dimensions k the smallest counts;
        rows at random subspaces are left out.
        """
        keys = ["layer", "matrix", "expert"]
        table = self.tables[probe]
        rows = whole_matrices(table[(table["quantity"] == quantity) & (table["step"] == self.step)])
        rows = rows[(rows["matrix"] != "") & (rows["subspace"] != "random")].sort_values("k", kind="stable")
        rows = rows[rows["matrix"].isin(of)] if of else rows
        return rows.drop_duplicates(keys).set_index(keys)["value"].astype(float).sort_index()

    def lacking(self, needs: Mapping[str, Sequence[str]]) -> str:
        """The first missing rows among `needs`, and the override that measures them; "" if all are there."""
        for probe, quantities in needs.items():
            if probe not in self.tables:
                probes = ",".join(dict.fromkeys(("rsf", "sparsity", "rotation", probe)))
                return f"no rows of the probe {probe}: add it, as in 'probe=[{probes}]'"
            table = self.tables[probe]
            there = set(table.loc[table["step"] == self.step, "quantity"])
            if missing := [name for name in quantities if name not in there]:
                if SINGLE in table.attrs:
                    return "the run has one checkpoint, and no update: give it an objective, or model=pair"
                return f"the probe {probe} has no rows {missing[0]} of this update"
        return ""

    def beyond(
        self,
        probe: str,
        quantity: str,
        side: Side,
        level: float | None = None,
        end: float | None = None,
        of: Sequence[str] = (),
    ) -> Finding:
        """The mean over matrices against `null_<quantity>_mean`, judged as `judged` does.

        The null's standard deviation of the mean is √(Σ sdᵢ²) / n, as its draws are independent between
        matrices; or the largest of the table's rows `<quantity>_mean_null_sd` for these kinds of matrix, if
        that is larger. Source: ours.
        """
        import pandas as pd

        names = (quantity, f"null_{quantity}_mean", f"null_{quantity}_sd")
        parts = [self.values(probe, name, of) for name in names]
        rows = pd.concat(parts, axis=1, keys=["ours", "null", "sd"]).dropna()
        if not len(rows):
            return Finding(UNTESTABLE, quantity, detail="no matrix has both the number and its null")
        ours, mean, n = float(rows["ours"].mean()), float(rows["null"].mean()), len(rows)
        sd = max(sqrt(float((rows["sd"] ** 2).sum())) / n, self._joint_sd(probe, quantity, of))
        verdict = judged(ours, mean, sd, side, level, end)
        detail = f"{ours:.3g} against {mean:.3g} ± {SDS * sd:.2g} of its null"
        if level is not None and verdict != CONTRADICTED:
            covered = max(0.0, (mean - level) / (ours - level))
            detail += f"; the null covers {covered:.0%} of the distance to {level:.3g}"
        return Finding(verdict, quantity, ours, mean, sd, n=n, detail=detail)

    def _joint_sd(self, probe: str, quantity: str, of: Sequence[str]) -> float:
        table = self.tables[probe]
        joint = table[(table["quantity"] == f"{quantity}_mean_null_sd") & (table["step"] == self.step)]
        return max(joint.loc[joint["matrix"].isin(of), "value"], default=0.0)


def judged(
    ours: float, null: float, sd: float, side: Side, level: float | None = None, end: float | None = None
) -> Verdict:
    """The verdict of `BEYOND_A_LEVEL`, of `BEYOND_THE_NULL` where there is no level, and of `BEYOND_A_SHARE`
    where the quantity has an `end`, which no null leaves room behind.

    *Worked example*: a published overlap above 0.3, here 0.7, with a null of 0.65: the null covers 0.35 of
    0.4, 88 %, of the distance, and explains it.
    """
    sign = 1 if side == "above" else -1
    gap = sign * (ours - null)
    if level is None:
        low, high = sorted((abs(ours), abs(null)))
        if abs(gap) <= SDS * sd or high <= MARGIN * low:
            return EXPLAINED
        return SUPPORTED if gap > 0 else CONTRADICTED
    distance = sign * (ours - level)
    if distance <= 0:
        return CONTRADICTED
    asked = (1 - PART) * (distance if end is None else min(distance, abs(end - null)))
    return SUPPORTED if gap > SDS * sd and gap >= asked else EXPLAINED


@runtime_checkable
class Claim(Protocol):
    """A published claim about an update: one dataclass in a file of its own."""

    paper: ClassVar[str]
    """Where it was published, with the version that was read if that is known."""
    statement: ClassVar[str]
    """The claim, in one sentence."""
    published: ClassVar[str]
    """The published number and its conditions; "" if none is known here."""
    about: ClassVar[str]
    """The kind of training that it is about: contrast, likelihood, or "" for any."""
    needs: ClassVar[Mapping[str, tuple[str, ...]]]
    """The quantities that its statistic takes, by probe."""
    rule: ClassVar[str]
    """The rule of its verdict, fixed before any data are looked at."""

    def judged(self, update: Update) -> Finding:
        """The verdict on an update of its kind that has all rows it needs."""
        ...


def verdicts(claims: Sequence[Claim], updates: Sequence[Update]) -> "pd.DataFrame":
    """A row for every claim and update.

    Columns: `claim` (the name of its class), `paper statement published update trained_by verdict quantity
    ours null null_sd unit n detail rule`.
    """
    import pandas as pd

    rows = [
        {
            "claim": type(claim).__name__,
            "paper": claim.paper,
            "statement": claim.statement,
            "published": claim.published,
            "update": update.name,
            "trained_by": update.trained_by,
            **asdict(_found(claim, update)),
            "rule": claim.rule,
        }
        for claim in claims
        for update in updates
    ]
    return pd.DataFrame(rows).astype({**dict.fromkeys(("ours", "null", "null_sd"), "Float64"), "n": "int64"})


def _found(claim: Claim, update: Update) -> Finding:
    """The finding; of an update of another kind its numbers, and no verdict."""
    if lacking := update.lacking(claim.needs):
        return Finding(UNTESTABLE, detail=lacking)
    finding = claim.judged(update)
    if any(number is not None and isnan(number) for number in (finding.ours, finding.null, finding.null_sd)):
        return replace(finding, verdict=UNTESTABLE, detail=f"not all numbers are known: {finding.detail}")
    if not claim.about or update.kind == claim.about or finding.verdict == UNTESTABLE:
        return finding
    of = f"the claim is about training by {KINDS.get(claim.about, claim.about)}"
    reason = f"{of}, and this update is of {update.trained_by}"
    if not update.kind:
        reason = f"{of}, and nothing says what trained this update: run it with model.stage=dpo, or the like"
    return replace(finding, verdict=UNTESTABLE, detail=f"{reason}; {finding.detail}")


def updates(
    tables: "Mapping[str, pd.DataFrame]", params: Mapping[str, object], role: str = ""
) -> list[Update]:
    """The updates that a run's tables are about, each with its own.

    `role` is that of the run's objective. A chain has one for every stage behind the first.
    """
    named = {name: table for name, table in tables.items() if "step" in table}
    stages = {plain_name(name): table for name, table in named.items() if name.endswith(BETWEEN)}
    if stages:
        if ALIGNMENT in named:  # which compares the stages' updates with each other
            stages[ALIGNMENT] = named[ALIGNMENT]
        return list(_of_chain(stages, params))
    own = {name: table for name, table in named.items() if name == plain_name(name) and name != STAGES}
    steps = [int(table["step"].max()) for table in own.values() if len(table)]
    objective, stage = str(params.get("objective", "none")), params.get("model.stage")
    trained_by = objective if objective != "none" else str(stage or "")
    kind = role if objective != "none" else TRAINED_BY.get(trained_by, "")
    return [Update("the update", own, max(steps, default=0), trained_by, kind, params)]


def _of_chain(tables: "Mapping[str, pd.DataFrame]", params: Mapping[str, object]) -> Iterator[Update]:
    names = next(iter(tables.values())).attrs[STAGES]
    for step in range(1, len(names)):
        stage = names[step]
        yield Update(f"{stage} after {names[step - 1]}", tables, step, stage, kind_of(stage), params)


def measured(row: "pd.Series", name: str) -> str:
    """A cell for people: `0.72`, `0.3 ± 0.01` of a null with two standard deviations, `12 degree`, or `-`."""
    known = row.dropna()
    if name not in known:
        return "-"
    sd = f" ± {SDS * float(known['null_sd']):.2g}" if name == "null" and "null_sd" in known else ""
    unit = "" if str(row["unit"]) == "1" else f" {row['unit']}"
    return f"{float(known[name]):.3g}{sd}{unit}"


def counted(table: "pd.DataFrame") -> str:
    """Such as `2 supported, 1 explained by its null`."""
    counts = {verdict: int((table["verdict"] == verdict).sum()) for verdict in VERDICTS}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)

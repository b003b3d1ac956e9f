"""The claims of arXiv:2603.13911v1, judged by the tables of a run: of one model, over its prompts."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightgeom.analysis.declared import in_section
from weightgeom.analysis.rules import CONTRADICTED, INCONCLUSIVE, SUPPORTED, UNTESTED, Verdict
from weightgeom.declarations import UNCERTAINTY, Declaration, InterventionDeclaration, ProbeDeclaration

if TYPE_CHECKING:
    import pandas as pd


LEVEL = 0.05
BYPASS = "bypass"  # the treatment that couples the signal to the logits
THRESHOLD = 0.15  # the cosine distance at which the paper counts components; the nearest there is


@dataclass(frozen=True)
class Line:
    """A claim, the verdict on it, and the numbers behind the verdict."""

    claim: str
    verdict: Verdict
    evidence: str


def lines(table: "pd.DataFrame | None", interventions: "Sequence[pd.DataFrame]", trained: bool) -> list[Line]:
    """A line for every claim and uncertain group, of the model before it was `trained` on, if it was.

    `table` is the probe's, and `interventions` are those of its section, the bypass among them or not.

    A claim is supported where the 95 % interval lies on its side in more than half of the layers,
    contradicted where it lies on the other side in more than half, and inconclusive otherwise. That groups
    are told apart is supported where the AUROC of the best layer exceeds those of the best layers of permuted
    labels, p ≤ 0.05; of dimensions, the median over layers decides. Where a table or the permutations lack,
    nothing is tested.
    """
    results = []
    if table is not None and len(table):
        rows = table[table["step"] == base_step(table, trained)]
        compared = rows[(rows["against"] != "") & (rows["dose"] == "")]
        for arm in sorted(compared["arm"].unique()):
            results += _of_group(rows, arm)
    else:
        results += [Line(claim, UNTESTED, "no rows of the probe uncertainty") for claim in CLAIMS]
    bypasses = [table_of_edits for table_of_edits in interventions if treatment(table_of_edits) == BYPASS]
    return [*results, *_of_interventions(bypasses[0] if bypasses else None)]


def tables_of_claims(
    tables: "Mapping[str, pd.DataFrame]", declarations: Mapping[str, Declaration]
) -> "tuple[pd.DataFrame | None, dict[str, pd.DataFrame]]":
    """The table of the first probe in the claims' section, and those of its interventions by treatment."""
    names = [name for name in in_section(declarations, UNCERTAINTY) if name in tables]
    probes = [tables[name] for name in names if isinstance(declarations[name], ProbeDeclaration)]
    edited = [tables[name] for name in names if isinstance(declarations[name], InterventionDeclaration)]
    return (probes[0] if probes else None), {treatment(table): table for table in edited if len(table)}


def base_step(table: "pd.DataFrame", trained: bool) -> int:
    """The base's: the first step of a training that starts from it, or the last step of its own."""
    return int(table["step"].min() if trained else table["step"].max())


CLAIMS = (
    "uncertain prompts are told apart inside the model",
    "their states have 2 to 3 times the intrinsic dimension of factual ones",
    "the difference is amplified from layer to layer",
    "the boundary lies outside the top output directions",
    "the output is less sensitive along the boundary than along random directions",
    "the boundary is not coupled to the abstention tokens",
    "uncertain states fragment into more components",
)
COUPLED = "coupling the signal to the logits by hand (bypass) restores abstention"


def _of_group(rows: "pd.DataFrame", arm: str) -> Iterator[Line]:
    def line(number: int, holds: bool, fails: bool, evidence: str) -> Line:
        return Line(CLAIMS[number], _verdict(holds, fails), f"{arm}: {evidence}")

    def over_layers(
        number: int, values: "pd.Series", holds: "pd.Series", fails: "pd.Series", what: str, when: str
    ) -> Line:
        summary = f"{what} {values.median():.2f}, the median over layers of {values.min():.2f} to"
        summary += f" {values.max():.2f}"
        counted = f"{when} in {int(holds.sum())} of {len(holds)} layers"
        return line(number, bool(holds.mean() > 0.5), bool(fails.mean() > 0.5), f"{summary}; {counted}")

    detected = _with_ends(rows, arm, "auroc_logistic")
    best = detected["value"].idxmax()
    value, low, high = detected.loc[best]
    auroc = f"AUROC {value:.3f} [{low:.3f}, {high:.3f}] in layer {best}, held out"
    p = _values(rows, arm, "auroc_logistic_max_p_value").get(best)
    if p is None or _permutations(rows, arm) + 1 < 1 / LEVEL:
        few = "no or too few permutations over layers: set probe.uncertainty.refits=39"
        yield Line(CLAIMS[0], UNTESTED, f"{arm}: {auroc}; {few}")
    else:
        yield line(0, bool(p <= LEVEL), False, f"{auroc}; p {p:.2g} among the best layers of permuted labels")
    ratios = _values(rows, arm, "mle_dimension_ratio")
    better = _values(rows, arm, "mle_dimension_calibrated_ratio")
    yield line(
        1,
        float(ratios.median()) >= 2,
        float(ratios.median()) < 2,
        f"ratio {ratios.median():.2f}, the median over layers of {ratios.min():.2f} to {ratios.max():.2f}"
        f" (calibrated {better.median():.2f})",
    )
    amplified = _with_ends(rows, arm, "amplification")
    first, last = amplified.index.min(), amplified.index.max()
    ends = amplified.loc[first], amplified.loc[last]
    yield line(
        2,
        bool(ends[1]["low"] > ends[0]["high"]),
        bool(ends[1]["high"] < ends[0]["low"]),
        f"{ends[0]['value']:.2f} of the norm in layer {first}, {ends[1]['value']:.2f} in layer {last}",
    )
    overlap = _with_ends(rows, arm, "overlap", subspace="output_top")
    below, above = overlap["high"] < 1, overlap["low"] > 1
    yield over_layers(3, overlap["value"], below, above, "overlap (1 is chance)", "below 1")
    ratio = _with_ends(rows, arm, "fisher_ratio")
    yield over_layers(4, ratio["value"], ratio["high"] < 1, ratio["low"] > 1, "ratio", "below 1")
    cosines = _values(rows, arm, "gradient_coupling")
    spread = 2 * _values(rows, arm, "gradient_coupling_random_sd").reindex(cosines.index, fill_value=0)
    near = cosines.abs() <= spread
    yield over_layers(
        5, cosines, near, ~near, "cosine", "within two standard deviations of random directions"
    )
    uncertain, factual = rows.loc[rows["arm"] == arm, ["treatment", "against"]].iloc[0]
    same = (rows["treatment"] == uncertain) & (rows["against"] == factual) & (rows["dose"] != "")
    threshold = min(rows.loc[same, "dose"].unique(), key=lambda dose: abs(float(dose) - THRESHOLD))
    where = rows.loc[same & (rows["dose"] == threshold), "arm"].iloc[0]
    more, p = (_values(rows, where, f"components_difference{end}") for end in ("", "_p_value"))
    what = f"difference at cosine distance {threshold}, as a share of the points,"
    apart = p <= LEVEL
    yield over_layers(6, more, (more > 0) & apart, (more < 0) & apart, what, f"above 0 with p ≤ {LEVEL}")


def _verdict(holds: bool, fails: bool) -> Verdict:
    return SUPPORTED if holds else CONTRADICTED if fails else INCONCLUSIVE


def treatment(table: "pd.DataFrame") -> str:
    """The name of the treatment of an intervention's table; "" of an empty one."""
    treated = table["draw"].isna() & (table["dose"] != "") & (table["against"] == "")
    return next(iter(table.loc[treated, "treatment"]), "")


def _of_interventions(table: "pd.DataFrame | None") -> Iterator[Line]:
    if table is None or not len(table):
        yield Line(COUPLED, UNTESTED, "no rows of the intervention bypass")
        return
    # The best layer and strength is a choice: the controls are granted the same, each its own best.
    gains = _gains(table)
    treated, controls = gains[gains["treatment"] == "bypass"], gains[gains["treatment"] == "random"]
    best = treated.loc[treated["gain"].idxmax()]
    there = controls[(controls["layer"] == best["layer"]) & (controls["dose"] == best["dose"])]
    others = controls.groupby("draw")["gain"].max()
    p = (1 + int((others >= best["gain"]).sum())) / (1 + len(others))
    more = best["gain"] > others.median() and p <= LEVEL
    random = there["abstention_change"]
    yield Line(
        COUPLED,
        _verdict(bool(more), bool(best["gain"] < others.median())),
        f"bypass@{best['dose']} in layer {best['layer']}: abstention {best['abstention_change']:+.2f}, false"
        f" abstention {best['false_abstention_change']:+.2f}; random projections there"
        f" {random.median():+.2f}, at most {random.max():+.2f}; p {p:.2g} of the gain, each at its best layer"
        " and strength",
    )


def _gains(table: "pd.DataFrame") -> "pd.DataFrame":
    """The gain of every arm, abstention less false abstention, by `treatment`, `draw`, `layer` and `dose`."""
    changes = table[table["quantity"].isin(["abstention_change", "false_abstention_change"])]
    changes = changes.assign(draw=changes["draw"].fillna(-1))  # of a treatment
    wide = changes.set_index(["treatment", "draw", "layer", "dose", "quantity"])["value"].unstack()
    return wide.assign(gain=wide["abstention_change"] - wide["false_abstention_change"]).reset_index()


def _with_ends(rows: "pd.DataFrame", arm: str, quantity: str, subspace: str = "residual") -> "pd.DataFrame":
    """`value`, and the ends `low` and `high` of its interval, by layer."""
    import pandas as pd

    ends = {"value": "", "low": "_low", "high": "_high"}
    return pd.DataFrame(
        {name: _values(rows, arm, f"{quantity}{end}", subspace) for name, end in ends.items()}
    )


def _permutations(rows: "pd.DataFrame", arm: str) -> int:
    """The number of permuted labels behind the p-value of the best layer."""
    return int(rows.loc[(rows["arm"] == arm) & (rows["quantity"] == "auroc_logistic_max_p_value"), "n"].min())


def _values(rows: "pd.DataFrame", arm: str, quantity: str, subspace: str = "residual") -> "pd.Series":
    """Values by layer."""
    kept = (rows["arm"] == arm) & (rows["quantity"] == quantity) & (rows["subspace"] == subspace)
    return rows[kept].set_index("layer")["value"]

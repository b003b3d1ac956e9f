"""What a run shows of the probe `uncertainty` and of edits of states: figures, claims, the bridge."""

# pandas types the results of indexing as unions of everything they may ever be.
# pyright: reportArgumentType=false

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from runners.record import Record

if TYPE_CHECKING:
    import pandas as pd

STATES = ("steer", "bypass", "repair")


def draw_uncertainty(
    tables: "Mapping[str, pd.DataFrame]", record: Record, save: Callable[[str, object], None]
) -> None:
    """The figures, and the claims and the bridge as tables, of what there is."""
    edited = {name: tables[name] for name in STATES if name in tables}
    if "uncertainty" not in tables and not edited:
        return
    import pandas as pd  # noqa: PLC0415 (heavy)

    from weightgeom import figures_uncertainty  # noqa: PLC0415 (heavy)
    from weightgeom.bridge import bridge  # noqa: PLC0415
    from weightgeom.claims_uncertainty import base_step, lines  # noqa: PLC0415

    trained = _trained(tables)
    if edited:
        save("abstentions", figures_uncertainty.abstentions(edited))
    if "uncertainty" in tables:
        table = tables["uncertainty"]
        step = base_step(table, trained)
        save("uncertainty_profiles", figures_uncertainty.profiles(table, step))
        save("uncertainty_topology", figures_uncertainty.topology(table, step))
        save("uncertainty_sensitivity", figures_uncertainty.sensitivity(table, step))
        if trained:
            after = int(table["step"].max())
            save("uncertainty_profiles_trained", figures_uncertainty.profiles(table, after))
        if trained and "rsf" in tables:
            found = bridge(table, tables["rsf"])
            if len(found):
                save("uncertainty_bridge", figures_uncertainty.bridge(found))
                found.to_csv(record.artifact("tables/bridge.csv"), index=False)
    claims = pd.DataFrame([vars(line) for line in lines(tables, trained)])
    claims.to_csv(record.artifact("tables/claims_uncertainty.csv"), index=False)


def claims_shown(tables: "Mapping[str, pd.DataFrame]", make: type) -> object | None:
    """The claims of arXiv:2603.13911v1 with their verdicts, as a table for the terminal; None if untested."""
    if not {"uncertainty", *STATES} & tables.keys():
        return None
    from weightgeom.claims_uncertainty import lines  # noqa: PLC0415

    shown = make("claim", "verdict", "evidence", title="arXiv:2603.13911v1")
    for line in lines(tables, _trained(tables)):
        shown.add_row(line.claim, line.verdict, line.evidence)
    return shown


def _trained(tables: "Mapping[str, pd.DataFrame]") -> bool:
    """Whether the run has trained what it probed; else it has measured what was there."""
    return "uncertainty" in tables and bool(tables["uncertainty"].attrs.get("trained"))

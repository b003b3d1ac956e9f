"""Figures of a run, saved into its record as PNG and PDF."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from runners.disk import full_disk_explained
from runners.tracking.record import Record
from weightgeom.analysis.chain import BETWEEN, STAGES
from weightgeom.analysis.claims_uncertainty import STATES, _trained
from weightgeom.analysis.comparisons import MARGIN
from weightgeom.table import PRETRAINING, own

if TYPE_CHECKING:
    import pandas as pd


def draw(tables: "Mapping[str, pd.DataFrame]", record: Record) -> None:
    """The figures of the probes `rsf` and `moments` and of interventions, as PNG and PDF, into the record."""
    from weightgeom.figures import base as figures

    def save(name: str, figure: object) -> None:
        with full_disk_explained(record.directory):
            paths = [record.artifact(f"figures/{name}.{ending}") for ending in ("png", "pdf")]
            figures.save(figure, *paths)  # pyright: ignore[reportArgumentType]

    draw_effects(tables, save)
    draw_uncertainty(tables, record, save)
    if "moments" in tables and len(own(tables["moments"], "measured_ratio")):
        save("mechanism", figures.expected_and_measured(tables["moments"]))
    if STAGES in tables:
        draw_stages(tables, save)
        return

    found = {
        "pretraining" if name.endswith(PRETRAINING) else "training": table
        for name, table in tables.items()
        if name.startswith("rsf") and len(own(table, "ratio"))
    }
    if not found:
        return

    save("ratio_by_step", figures.ratio_by_step(found))
    increments = {name: table for name, table in found.items() if len(own(table, "increment_ratio"))}
    if increments:
        save("increment_by_step", figures.ratio_by_step(increments, "increment_ratio"))
    for name, table in found.items():
        suffix = PRETRAINING if name == "pretraining" and len(found) > 1 else ""
        save(f"ratio_by_layer{suffix}", figures.ratio_by_layer(table, int(table["step"].max())))


def draw_effects(tables: "Mapping[str, pd.DataFrame]", save: Callable[[str, object], None]) -> None:
    """The figures of the interventions `rank1` and `surgery`."""
    if not {"rank1", "surgery"} & tables.keys():
        return
    from weightgeom.figures import causal as figures_causal

    if "rank1" in tables:
        save("rank1_by_layer", figures_causal.treatment_by_layer(tables["rank1"]))
        save("rank1_dose_response", figures_causal.dose_response(tables["rank1"]))
        if (tables["rank1"]["quantity"] == MARGIN).any():
            save("rank1_dose_response_margin", figures_causal.dose_response(tables["rank1"], MARGIN))
    if "surgery" in tables and (tables["surgery"]["quantity"] == MARGIN).any():
        save("surgery", figures_causal.surgery_curve(tables["surgery"]))
        if (tables["surgery"]["dose"] == "transplant").any():
            save("transplants", figures_causal.transplants(tables["surgery"]))


def draw_stages(tables: "Mapping[str, pd.DataFrame]", save: Callable[[str, object], None]) -> None:
    """The comparison of all stages, and of each with the one before it the profile over layers."""
    from weightgeom.figures import base as figures
    from weightgeom.figures import chain as figures_stages

    table = tables[STAGES]
    if not (table["quantity"] == "ratio").any():  # nothing moved anywhere
        return
    save(STAGES, figures_stages.ratio_by_stage(table))
    steps = tables[f"rsf{BETWEEN}"]
    names = steps.attrs[STAGES]
    for step in range(1, len(names)):
        if ((steps["step"] == step) & (steps["quantity"] == "ratio")).any():
            save(f"ratio_by_layer_{names[step]}", figures.ratio_by_layer(steps, step))


def draw_uncertainty(
    tables: "Mapping[str, pd.DataFrame]", record: Record, save: Callable[[str, object], None]
) -> None:
    """The figures, and the claims and the bridge as tables, of what there is."""
    edited = {name: tables[name] for name in STATES if name in tables}
    if "uncertainty" not in tables and not edited:
        return
    import pandas as pd

    from weightgeom.analysis.bridge import bridge
    from weightgeom.analysis.claims_uncertainty import base_step, lines
    from weightgeom.figures import uncertainty as figures_uncertainty

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

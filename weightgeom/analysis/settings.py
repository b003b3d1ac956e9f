"""The names of the settings of a study's runs, from the parameters in which they differ."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from weightgeom.analysis.declared import CLASS, EARLIER, of_text, role
from weightgeom.declarations import Declaration, ProbeDeclaration

if TYPE_CHECKING:
    import pandas as pd

SETTING = ["model", "data", "preference", "objective", "variant", "trajectory"]
GROUPS = ("model", "data", "objective", "training")
ARROW = " → "  # between two checkpoints that are compared
# The training between a pair's checkpoints, by its `model.stage`.
TRAINED_BY = {
    **dict.fromkeys(("dpo", "kto", "ipo", "orpo", "simpo", "rlhf", "ppo", "grpo"), "contrast"),
    **dict.fromkeys(("sft", "ce", "pretraining"), "likelihood"),
}
LONG = 40  # characters of a variant that a name still holds
SEEDS = ("model.seed", "data.seed")
NAMED = ("data.preference",)  # has a column of its own
# Keys that change neither an update nor the measurement of its ratio.
HARMLESS = (
    *("training.log_every", "training.log_gradients", "training.workers", "training.keep"),
    *("training.save_every", "model.pretraining.log_every"),
)
Params = Mapping[str, str]


def settings(
    runs: Sequence[Params],
    tags: Sequence[Params] | None = None,
    declarations: Mapping[str, Declaration] = EARLIER,
) -> list[dict[str, object]]:
    """The columns that describe the make-up of every run, in order.

    `objective`, `model`, `data`, `preference` and their seeds; other differences between runs of the same
    choice go into the objective's name, or else into `variant`. `base_variant` is the part of `variant` that
    matters to the pretraining too. `role` is that of the objective, `undeclared` where it declares none;
    `aligns`: it contrasts responses; `entropy`: it maximises likelihood; `of_text`: on the corpus, and not on
    responses; `pair`: two finished checkpoints, `compared`, whose role is that of `model.stage`; `chain`:
    several, of whose trainings nothing is known; `design`: the parameters that compared settings share;
    `matches`: the quantities in which the controls of interventions are matched. `model_is`, `data_is`, ...
    are all parameters of a choice. `tags` are those of the runs, and `declarations` those of their tables.
    """
    about = [{}] * len(runs) if tags is None else tags
    return [_setting(run, runs, of_run, declarations) for run, of_run in zip(runs, about, strict=True)]


def is_run(params: Params) -> bool:
    """Whether these are parameters of a run, and not of a sweep's parent or of one worker's piece."""
    piece = params.get("probe.worker", "None") != "None"
    return {"model", "data", "objective"} <= params.keys() and not piece


def placed(rows: "pd.DataFrame", runs: "pd.DataFrame") -> "pd.DataFrame":
    """The rows with a column `replicate`, the seeds that tell it from others of its setting, and `setting`.

    A pretraining belongs to all runs that start from it: it is one setting whatever they then did. Of
    several runs that are the same in all of this, the newest that has a table counts.
    """
    about = runs.set_index("run_id")
    before = rows["trajectory"] == "pretraining"
    # Models of the hub and texts of a user have no seed, and a missing one would be no group.
    model, data = (rows[key].astype("str").fillna("-") for key in ("model_seed", "data_seed"))
    base = model + "/" + data
    if "compared" in about:  # pairs have no seeds: each is a training of its own
        compared = rows["run_id"].map(about["compared"]).fillna("")
        base = base.where(compared == "", base + "/" + compared)
    named = rows.assign(
        objective=rows["objective"].where(~before, "pretraining"),
        preference=rows["preference"].where(~before, ""),
        variant=rows["variant"].where(~before, rows["run_id"].map(about["base_variant"])),
        base=base,
        replicate=base.where(before, rows["seed"].astype("str") + "/" + base),
    )
    newest = named.groupby([*SETTING, "replicate", "table"])["run_id"].transform("last")
    named = named[named["run_id"] == newest].reset_index(drop=True)
    return named.assign(setting=names(named))


def names(frame: "pd.DataFrame") -> "pd.Series":
    """The name of every row's setting, as short as tells them apart."""
    import pandas as pd

    name = frame["objective"].astype(object)
    variants = [variant for variant in frame["variant"].unique() if variant]
    short = {
        variant: variant if len(variant) <= LONG else f"variant {number}"
        for number, variant in enumerate(variants, 1)
    }
    for values in (frame["preference"], frame["variant"].map(short)):
        has_value = values.notna() & (values != "")
        name = name.where(~has_value, name + " · " + values.astype(object).fillna(""))
    for column in ("data", "model"):
        if frame[column].nunique() > 1:
            name = frame[column].astype(object) + ": " + name
    return pd.Series(name, index=frame.index)


def _setting(
    run: Params, runs: Sequence[Params], tags: Params, declarations: Mapping[str, Declaration]
) -> dict[str, object]:
    pair = run.get("model._target_", "").endswith("TwoCheckpoints")
    stage = run.get("model.stage", "None") if pair else "None"
    chain = run.get("model._target_", "").endswith(".Chain") and run.get("model.from", "None") == "None"
    trains, kind = run["objective"] != "none", role(run, tags)
    objective = " ".join([run["objective"], *_differing(run, runs, "objective")])
    compared = f"{run['model.before']}{ARROW}{run['model.after']}" if pair else ""
    if pair:
        objective = compared if stage == "None" else stage
        kind = TRAINED_BY.get(stage, "")
    if chain:  # each of its rows has the two stages that it compares
        objective = "a chain of stages"
    base = [
        *_differing(run, runs, "model"),
        *_differing(run, runs, "data"),
        *_measured(run, runs, declarations),
    ]
    return {
        "objective": objective,
        "variant": ", ".join([*base, *(_differing(run, runs, "training") if trains else [])]),
        "base_variant": ", ".join(base),
        "seed": int(run["seed"]),
        "model": run["model"],
        "model_seed": _seed(run, "model.seed"),
        "data": run["data"],
        "data_seed": _seed(run, "data.seed"),
        "preference": run.get("data.preference", ""),
        "role": kind,
        "objective_class": run.get(CLASS, "").rpartition(".")[2],
        "aligns": kind == "contrast",
        "entropy": kind == "likelihood",
        "of_text": of_text(run, tags),
        "pair": pair,
        "compared": compared,
        "design": _design(run, base),
        "matches": ", ".join(
            f"{key.split('.')[1]}={run[key]}"
            for key in run
            if key.startswith("intervention.") and key.endswith(".match")
        ),
        "chain": chain,
        **{f"{group}_is": _told(run, group) for group in GROUPS},
    }


def _design(run: Params, base: Sequence[str]) -> str:
    """The key that runs share if their numbers can be compared: the base, the data and the measurement.

    Seeds and the preference are left out: the seeds tell replicates apart, the preference has a column.
    """
    keys = sorted(key for key in run if key.startswith(("model", "data")))
    keys = [key for key in keys if key not in (*SEEDS, *NAMED, *HARMLESS, "model.before", "model.after")]
    return "; ".join([*(f"{key}={run[key]}" for key in keys), *base])


def _told(run: Params, group: str) -> str:
    """The parameters of a run's choice of a group, but those that were left open."""
    keys = [key for key in run if key.startswith(f"{group}.") and not key.endswith("._target_")]
    parameters = [
        f"{key.removeprefix(f'{group}.')}={run[key]}" for key in keys if run[key] not in ("None", "{}")
    ]
    return ", ".join(parameters)


def _differing(run: Params, runs: Sequence[Params], group: str) -> list[str]:
    """`key=value` of every key of a group in which runs with the same choice of that group differ."""
    peers = [peer for peer in runs if peer[group] == run[group]]
    keys = [key for key in run if key.startswith(f"{group}.") and key not in (*SEEDS, *NAMED, *HARMLESS)]
    if "TwoCheckpoints" in run.get("model._target_", ""):
        keys = [key for key in keys if key not in ("model.before", "model.after", "model.stage")]  # its name
    prefix = f"{group}." if group == "objective" else ""
    return [f"{key.removeprefix(prefix)}={run[key]}" for key in keys if _differ(peers, key)]


def _measured(run: Params, runs: Sequence[Params], declarations: Mapping[str, Declaration]) -> list[str]:
    """The options of measurement in which runs differ: their numbers must not be pooled."""
    differences = []
    for key in run:
        group, _, rest = key.partition(".")
        name, _, field = rest.partition(".")
        if group not in ("probe", "intervention") or not field:
            continue
        declaration = declarations.get(name)
        harmless = declaration.harmless if isinstance(declaration, ProbeDeclaration) else ()
        if field.partition(".")[0] not in harmless and _differ(runs, key):
            differences.append(f"{key}={run[key]}")
    return differences


def _differ(runs: Sequence[Params], key: str) -> bool:
    return len({run[key] for run in runs if key in run}) > 1


def _seed(run: Params, key: str) -> int | None:
    value = run.get(key, "")
    return int(value) if value.isdigit() else None

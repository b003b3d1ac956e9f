"""Every type is trained and measured: a step of DPO on its checkpoint, the probes and an intervention."""

import math
from dataclasses import replace
from pathlib import Path

import networks
import pytest
import small

from weightgeom.causal.effects import Effects
from weightgeom.interfaces import Setting
from weightgeom.interventions.rank1 import Rank1
from weightgeom.models.language_model import kept_buffers
from weightgeom.models.loading import load, load_network
from weightgeom.models.residual import Kind
from weightgeom.objectives.dpo import DPO
from weightgeom.probes.moments import Moments
from weightgeom.probes.rsf import RSF
from weightgeom.training.config import Training
from weightgeom.training.fit import fit

EXAMPLES = small.WORLD.examples()
D, K = 32, 4
TRAINING = Training(steps=1, batch_size=8, learning_rate=1e-3, max_length=48, log_every=1)
EFFECTS = Effects(tokens=48, length=12, pairs=2, pair_length=32, questions=2)
RANK1 = Rank1(strengths=[0.1], tokens=48, controls={"random": 19}, effects=EFFECTS)
EDITED: tuple[list[Kind], ...] = (
    ["k", "o"],
    ["linear_k", "linear_o"],
    ["conv_x", "conv_o"],
    ["mamba_x", "mamba_o"],
)


@pytest.mark.slow
@pytest.mark.parametrize("name", networks.CONFIGS | networks.MIXTURES)
def test_a_step_of_dpo_moves_every_matrix_and_is_measured_on_disk(name: str, tmp_path: Path) -> None:
    before, after = networks.save(name, tmp_path / "before"), tmp_path / "training/step-1"
    model, log = load(before, "cpu"), small.Curves()
    arguments = {"name": name, "seed": 0, "device": "cpu", "log_metrics": log, "start": before}
    fit(DPO(), load_network(before), model.tokenizer, EXAMPLES, TRAINING, after.parent, **arguments)
    if not model.architecture.stacks:  # to which TRL adds the balance of the routers
        # The policy is still the reference.
        assert log.by_step[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)

    start = model.params(before)
    setting = Setting(model, start, model.params(after, start), False, EXAMPLES, 0, DPO(), TRAINING)
    matrices = {matrix.name for matrix in model.architecture.matrices}
    rows = RSF(k=K, tokens=256, prompts=8, resamples=4).measurement(setting)(setting.end)
    assert measured(rows, "ratio") == matrices
    assert all(0 <= row["value"] <= D / K for row in rows if row["quantity"] == "ratio")
    norms = {row.get("parameter"): row["value"] for row in rows if row["quantity"] == "delta_norm"}
    assert {name for name, norm in norms.items() if norm == 0} <= kept_buffers(model.network)

    rows = Moments(k=K, prompts=8, tokens=256, resamples=2, groups=2).measurement(setting)(setting.end)
    assert measured(rows, "measured_ratio") == matrices
    for quantity in ("predicted_ratio", "forecast_adam_ratio"):  # no gradients are taken of a mixture
        assert measured(rows, quantity) == (set() if model.architecture.stacks else matrices)

    for kinds in EDITED:
        layers = [matrix.layer for matrix in model.architecture.matrices if matrix.kind == kinds[0]]
        if layers:
            rows = replace(RANK1, matrices=kinds, layers=layers[-1:]).rows(setting, lambda *_: None)
            effects = [row["value"] for row in rows if row["quantity"] == "kl_from_unedited"]
            assert len(effects) == 2 * 20 and min(effects) > 0  # the treatment and 19 draws, of both kinds


def measured(rows, quantity) -> set[str]:
    """The matrices with a value of a quantity at their own subspace."""
    return {
        f"L{row['layer']}.{row['matrix']}" + ("" if row.get("expert") is None else f".{row['expert']}")
        for row in rows
        if row["quantity"] == quantity and row.get("subspace") != "random"
    }

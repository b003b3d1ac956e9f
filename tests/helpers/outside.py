"""A package outside the repository: a probe, a function of two matrices, an objective and an intervention."""

from pathlib import Path

PROBES = '''
from dataclasses import dataclass
from typing import ClassVar

from weightgeom.declarations import ProbeDeclaration
from weightgeom.table import row


@dataclass(frozen=True)
class SpectralNorm:
    """The largest singular value of the update."""

    headline = "spectral_norm"
    scale: float = 1.0

    def of_matrix(self, before, after):
        update = self.scale * (after - before)
        return {"spectral_norm": float(update.svd().S[0]), "frobenius_norm": float(update.norm())}


@dataclass(frozen=True)
class Growth:
    """How much every matrix has grown, and all of them together."""

    declaration: ClassVar = ProbeDeclaration("growth", label="growth of the norm", section="Norms")

    def check(self, architecture):
        pass

    def measurement(self, setting):
        def measure(params):
            rows = []
            for matrix in setting.model.architecture.matrices:
                norms = [float(matrix.of(weights).norm()) for weights in (setting.start, params)]
                place = {"layer": matrix.layer, "matrix": matrix.label, "role": matrix.role}
                rows.append(row("growth", norms[1] / norms[0], n=1, **place))
            total = sum(one["value"] for one in rows) / len(rows)
            return [*rows, row("mean_growth", total, n=len(rows))]

        return measure
'''
OBJECTIVE = '''
import functools
from dataclasses import dataclass

from weightgeom.training.sharpness import Sharpness
from weightgeom.training.trainers import chosen_and_rejected


@dataclass(frozen=True)
class SimPO:
    """-log sigmoid(beta (mean log p of chosen - of rejected) - gamma), without a reference."""

    beta: float = 2.0
    gamma: float = 0.5
    first_loss = None

    def check(self, examples):
        if not examples.pairs:
            raise ValueError("objective=simpo needs pairs")

    def trainer(self, network, tokenizer, examples, arguments):
        import datasets
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        from weightgeom.text.conversation import render

        settings = dict(arguments)
        adapter = settings.pop("peft_config", None)
        settings.pop("activation_checkpointing", None)
        pairs = [render(pair, tokenizer) for pair in examples.pairs]
        names = ("prompt", "chosen", "rejected")
        trainer = CPOTrainer(
            model=network,
            args=CPOConfig(
                **settings, loss_type="simpo", beta=self.beta, simpo_gamma=self.gamma, cpo_alpha=0.0,
                remove_unused_columns=False,
            ),
            train_dataset=datasets.Dataset.from_dict({n: [getattr(one, n) for one in pairs] for n in names}),
            processing_class=tokenizer,
            peft_config=adapter,
        )
        trainer.add_callback(Sharpness(trainer, self.scored, store=trainer.store_metrics))
        return trainer

    def scored(self, inputs):
        return chosen_and_rejected(inputs)

    def total_loss(self, trainer, inputs):
        return trainer.compute_loss(trainer.model, inputs) * len(inputs["chosen_input_ids"])
'''
ROLE = """
    role = "contrast"

    def of_text(self, examples):
        return False
"""
INTERVENTION = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from weightgeom.causal.edits import RankOne
from weightgeom.causal.effects import Effects, Evaluation
from weightgeom.causal.trials import Arm, Trial, measured, with_q_values
from weightgeom.declarations import InterventionDeclaration


@dataclass(frozen=True)
class Damp:
    """Takes a share of the largest singular value of q away, against as much along random directions."""

    declaration: ClassVar = InterventionDeclaration(("kl_from_unedited",), ("random",), "Damping")
    strength: float = 1.0
    random: int = 19

    def check(self, architecture):
        pass

    def arms(self, architecture):
        return architecture.n_layers * (1 + self.random)

    def rows(self, setting, log):
        evaluation = Evaluation(setting.model, setting.end, setting.examples, Effects(tokens=128))
        rows = list(measured(self.trials(setting), evaluation, setting.seed, log, keep=setting.keep))
        return [{"step": setting.last, **one} for one in with_q_values(rows)]

    def trials(self, setting):
        generator = torch.Generator().manual_seed(setting.seed)
        for matrix in setting.model.architecture.matrices:
            if matrix.kind != "q":
                continue
            u, s, vt = torch.linalg.svd(matrix.of(setting.end).double())
            alpha = -self.strength * float(s[0])
            arms = [Arm("damp", RankOne(matrix, alpha, u[:, 0], vt[0]), {"frobenius norm": -alpha})]
            for draw in range(self.random):
                left, right = (
                    torch.nn.functional.normalize(torch.randn(d, generator=generator, dtype=u.dtype), dim=0)
                    for d in (len(u), len(vt))
                )
                edit = RankOne(matrix, alpha, left, right)
                arms.append(Arm("random", edit, {"frobenius norm": -alpha}, "frobenius norm", draw))
            place = {"layer": matrix.layer, "matrix": "q", "role": "read"}
            yield Trial(place, f"{self.strength:g}", arms[0], arms[1:])
'''


def write(directory: Path) -> Path:
    """The package `mylab` in a directory, which then belongs on PYTHONPATH."""
    package = directory / "mylab"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "probes.py").write_text(PROBES.lstrip())
    (package / "simpo.py").write_text(OBJECTIVE.lstrip() + ROLE)
    (package / "roleless.py").write_text(OBJECTIVE.lstrip())
    (package / "damp.py").write_text(INTERVENTION.lstrip())
    choices = directory / "conf/objective"  # chosen by `--config-dir`
    choices.mkdir(parents=True)
    for name in ("simpo", "roleless"):
        (choices / f"{name}.yaml").write_text(f"_target_: mylab.{name}.SimPO\nbeta: 2.0\n")
    return directory

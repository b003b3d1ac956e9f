"""The claim of arXiv:2606.23740v1 that DPO updates weights almost orthogonally to likelihood training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from weightgeom.analysis.referee import UNTESTABLE, Finding, Update, judged
from weightgeom.analysis.trainings import CONTRAST, LIKELIHOOD, between, kind_of, pairs, training_of


@dataclass(frozen=True)
class DpoNearOrthogonal:
    """The cosine of two objectives' updates is near 0, where seeds of one objective are not."""

    paper: ClassVar[str] = "arXiv:2606.23740v1"
    statement: ClassVar[str] = "The update of DPO is nearly orthogonal to that of SFT on the same data."
    published: ClassVar[str] = (
        "near-orthogonal (Qwen3-4B, attention-only LoRA; DPO at a tenth of the others' learning rate), SFT,"
        " RFT and RIFT at cosines of 0.97 or more; by the abstract, no number for DPO is known here"
    )
    about: ClassVar[str] = ""
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {"alignment": ("cosine",)}
    level: float = 0.2  # below it two updates are nearly orthogonal: 96 % of ‖A‖² lies off B (ours)
    rule: ClassVar[str] = (
        "of trainings by preferences or rewards against trainings by likelihood, from one base, with two"
        " seeds or more of each; contradicted if the mean cosine between them is 0.2 or more in size;"
        " explained by its null if seeds of one training are not more aligned than it by half of its distance"
        " to 0.2, and by 2 standard deviations over their pairs; supported otherwise"
    )

    def judged(self, update: Update) -> Finding:
        """Against seeds of the same training."""
        table = update.tables["alignment"]
        seeds = between(table, "cosine")
        kinds = [{kind_of(first), kind_of(second)} for first, second in seeds.index]
        seeds = seeds.loc[[kind == {CONTRAST, LIKELIHOOD} for kind in kinds]]
        if len(seeds):
            ours, null, sd = (float(seeds[name].abs().mean()) for name in ("between", "within", "sd"))
            detail = f"{ours:.3g} between them, {null:.3g} ± {2 * sd:.2g} between seeds of one training"
            verdict = judged(ours, null, sd, "below", self.level)
            return Finding(verdict, "cosine", ours, null, sd, n=len(seeds), detail=detail)
        there = pairs(table, update.step)
        apart = [
            abs(cosine)
            for (first, second), cosine in there["cosine"].dropna().to_dict().items()
            if {kind_of(training_of(first)), kind_of(training_of(second))} == {CONTRAST, LIKELIHOOD}
        ]
        if not apart:
            detail = "no training by preferences or rewards stands against one by likelihood"
            return Finding(UNTESTABLE, "cosine", detail=detail)
        ours = sum(apart) / len(apart)
        detail = (
            f"the cosine is {ours:.3g} in size, and nothing says how alike two seeds of one training are:"
            " weightgeom align BASE dpo=A dpo=B sft=C sft=D"
        )
        return Finding(UNTESTABLE, "cosine", ours, n=len(apart), detail=detail)

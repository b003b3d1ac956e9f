"""The claim of arXiv:2505.14185v3 that prompts with different safety implications use one subspace."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from weightgeom.analysis.referee import EXPLAINED, SDS, Finding, Update
from weightgeom.analysis.rules import CONTRADICTED, MARGIN, SUPPORTED
from weightgeom.table import whole_matrices


@dataclass(frozen=True)
class SafetyOverlaps:
    """The leading directions of two groups' states overlap as those of groups with shuffled labels do."""

    paper: ClassVar[str] = "arXiv:2505.14185v3"
    statement: ClassVar[str] = "Prompts with different safety implications activate overlapping subspaces."
    published: ClassVar[str] = (
        "five models of the Llama and Qwen families; by the abstract, no number is known here"
    )
    about: ClassVar[str] = ""
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "rsf": (
            *("group_overlap", "null_group_overlap_mean"),
            *("permuted_group_overlap_mean", "permuted_group_overlap_sd"),
        )
    }
    frame: str = ""  # the name of the contrast in `probe.rsf.frames`; "": the first of them
    rule: ClassVar[str] = (
        "of the states before the training, at the contrast's two groups of prompts: contradicted if the mean"
        f" overlap is below that of groups with shuffled labels by a factor of {MARGIN} and by more than"
        f" {SDS} of their standard deviations; explained by its null if it is less than {MARGIN}"
        " times that of two random subspaces, max(k_A, k_B) / d; supported otherwise"
    )

    def judged(self, update: Update) -> Finding:
        """Over the places of all matrices, which share prompts: their errors do not shrink with n."""
        table = update.tables["rsf"]
        rows = whole_matrices(table.loc[(table["step"] == update.step) & (table["subspace"] != "")])
        of_groups = rows.loc[rows["quantity"] == "group_overlap"]
        name = self.frame or str(of_groups["subspace"].iloc[0])
        rows = rows.loc[rows["subspace"] == name]
        ours, chance, shuffled, sd = (
            float(rows.loc[rows["quantity"] == quantity, "value"].mean()) for quantity in self.needs["rsf"]
        )
        below = MARGIN * ours < shuffled and shuffled - ours > SDS * sd
        verdict = CONTRADICTED if below else EXPLAINED if ours < MARGIN * chance else SUPPORTED
        detail = (
            f"{name}: {ours:.3g}, with shuffled labels {shuffled:.3g} ± {SDS * sd:.2g},"
            f" at random {chance:.3g}"
        )
        n = int((rows["quantity"] == "group_overlap").sum())
        return Finding(verdict, "group_overlap", ours, shuffled, sd, n=n, detail=detail)

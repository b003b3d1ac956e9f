"""The claim of arXiv:2603.13911v1 that uncertainty is detected inside a model, and not expressed."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

from weightgeom.analysis.claims_uncertainty import CLAIMS, base_step, lines
from weightgeom.analysis.referee import EXPLAINED, UNTESTABLE, Finding, Update
from weightgeom.analysis.rules import CONTRADICTED, SUPPORTED, UNTESTED


@dataclass(frozen=True)
class UncertaintyUnexpressed:
    """Uncertain prompts are told apart in the residual stream, by directions that the output hardly uses."""

    paper: ClassVar[str] = "arXiv:2603.13911v1"
    statement: ClassVar[str] = (
        "Uncertain prompts are told apart inside the model, and the boundary lies outside the top output"
        " directions."
    )
    published: ClassVar[str] = ""
    about: ClassVar[str] = ""
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {"uncertainty": ("auroc_logistic", "overlap")}
    rule: ClassVar[str] = (
        "of the model before the training: supported if both parts are by the rules of the probe uncertainty,"
        " for every group of prompts; contradicted if a part is; explained by its null otherwise"
    )

    def judged(self, update: Update) -> Finding:
        """By the lines of `analysis.claims_uncertainty`; the overlap of random directions is 1."""
        table = update.tables["uncertainty"]
        both = (CLAIMS[0], CLAIMS[3])
        tested = [line for line in lines(table, [], bool(table.attrs.get("trained"))) if line.claim in both]
        verdicts = {line.verdict for line in tested}
        detail = "; ".join(line.evidence for line in tested)
        if UNTESTED in verdicts:
            return Finding(UNTESTABLE, "overlap", detail=detail)
        verdict = (
            CONTRADICTED if CONTRADICTED in verdicts else SUPPORTED if verdicts == {SUPPORTED} else EXPLAINED
        )
        at_base = table["step"] == base_step(table, bool(table.attrs.get("trained")))
        in_output = (table["quantity"] == "overlap") & (table["subspace"] == "output_top")
        overlaps = list(table.loc[at_base & in_output, "value"])
        return Finding(verdict, "overlap", float(median(overlaps)), 1.0, n=len(overlaps), detail=detail)

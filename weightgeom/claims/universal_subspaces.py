"""The claim of arXiv:2512.05117v2 that trainings of one architecture use one low-dimensional subspace."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from weightgeom.analysis.referee import EXPLAINED, UNTESTABLE, Finding, Update
from weightgeom.analysis.rules import CONTRADICTED, MARGIN, SUPPORTED
from weightgeom.analysis.trainings import pairs, training_of


@dataclass(frozen=True)
class UniversalSubspaces:
    """An update lies in the leading directions of other trainings' updates, beyond the mean of both."""

    paper: ClassVar[str] = "arXiv:2512.05117v2"
    statement: ClassVar[str] = (
        "Updates of different trainings of one architecture share a subspace of few directions."
    )
    published: ClassVar[str] = (
        "few principal directions hold most of the variance of 500 LoRA adapters of Mistral-7B, and of"
        " others; by the abstract, no number is known here"
    )
    about: ClassVar[str] = ""
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "alignment": (
            *("cosine", "alignment_ratio"),
            *("null_alignment_ratio_mean", "null_alignment_ratio_sd"),
        )
    }
    rule: ClassVar[str] = (
        "contradicted if the mean share of an update in the leading directions of another is less than"
        f" {MARGIN} times that of a random rotation; explained by its null if it is less than {MARGIN} times"
        " that of two updates with a common mean, c + (1 - c) r, with c their cosine and r the rotation's"
        " share; supported otherwise"
    )

    def judged(self, update: Update) -> Finding:
        """Against the mean adapter: two updates m + a and m + b with random a and b (ours)."""
        there = pairs(update.tables["alignment"], update.step)
        cosines = {frozenset(pair): cosine for pair, cosine in there["cosine"].dropna().to_dict().items()}
        apart = there.loc[[training_of(first) != training_of(second) for first, second in there.index]]
        if not len(apart):
            detail = "all updates are of one training: give several, as in weightgeom align BASE dpo=A sft=B"
            return Finding(UNTESTABLE, "alignment_ratio", detail=detail)
        shares = apart["alignment_ratio"] ** 2
        rotations = apart["null_alignment_ratio_mean"] ** 2 + apart["null_alignment_ratio_sd"] ** 2
        common = [max(0.0, cosines.get(frozenset(pair), 0.0)) for pair in apart.index]
        means = [cosine + (1 - cosine) * share for cosine, share in zip(common, rotations, strict=True)]
        ours, random, null = float(shares.mean()), float(rotations.mean()), sum(means) / len(means)
        verdict = CONTRADICTED if ours < MARGIN * random else EXPLAINED if ours < MARGIN * null else SUPPORTED
        detail = (
            f"{ours:.3g} of an update lies in another's leading directions, {random:.3g} at random and"
            f" {null:.3g} with a common mean"
        )
        return Finding(verdict, "alignment_ratio²", ours, null, n=len(apart), detail=detail)

"""The claims of arXiv:2605.16600, and the rules that judge them, fixed before any data are looked at.

Every test is about trainings: its numbers are one per training (seed, objective and base), never one per
layer or matrix, and trainings that are copies of each other count once. Margins, level and family are ours.
The rules judge the direction of a claim, never a number of the paper.
"""

from dataclasses import dataclass
from typing import Literal

SUPPORTED, CONTRADICTED = "supported", "contradicted"
INCONCLUSIVE, UNTESTED = "inconclusive", "not tested"
Verdict = Literal["supported", "contradicted", "inconclusive", "not tested"]
LEVEL = 0.05  # of the whole family, for each of the two sides
MARGIN = 1.25  # ratios within 1/MARGIN to MARGIN count as equal
TRAININGS = 2  # the least number of trainings, or of bases, that a test needs
OBJECTIVES = 5  # the least number of objectives whose order is tested: 2/4! is above the level
RUNS = 3  # the least number of trainings of a correlation over trainings
DECISION = (
    f"Supported or contradicted where the p-value of that side is at most {LEVEL} after Holm's correction"
    " over all tests of the report; otherwise inconclusive; not tested with fewer trainings than a test"
    " needs. p-values are Student's t over trainings, two-sided for a direction, and of two one-sided"
    " tests for an equivalence. Intervals are the 95 % intervals of one test, without the correction."
)


@dataclass(frozen=True)
class Claim:
    """A claim, the rule that judges it, and the command that tests it."""

    number: int
    statement: str
    rule: str
    test: str


CLAIMS = (
    Claim(
        1,
        "Alignment's updates concentrate in the read pathway, along the principal directions of what q and k"
        " read.",
        f"Direction: the geometric mean over trainings of the ratio of q and k lies above {MARGIN}. Any"
        " sum of outer products with the inputs does so to some degree; claim 2 compares with that.",
        "weightgeom run objective=dpo seed=0,1,2 -m",
    ),
    Claim(
        2,
        "This concentration is that of the inputs, whatever the objective.",
        f"Equivalence within a factor of {MARGIN}: of the ratio of q and k and the matched level of the same"
        " inputs, and of the ratios of alignment and of a likelihood objective, training by training.",
        "weightgeom run objective=dpo,sft seed=0,1,2 -m",
    ),
    Claim(
        3,
        "In the write pathway (o, down) alignment's updates are near-isotropic against the prediction"
        " subspace.",
        f"Equivalence: the geometric mean over trainings of the write ratio lies within a factor of {MARGIN}"
        " of 1.",
        "weightgeom run objective=dpo seed=0,1,2 -m",
    ),
    Claim(
        4,
        "Alignment writes less than cross-entropy does.",
        "Direction: the write ratio of the alignment over that of the pretraining of its base lies below 1,"
        " over bases; over that of a likelihood objective on the same base, data and preference, over"
        " trainings.",
        "weightgeom run objective=dpo,sft seed=0,1,2 'model.seed=${seed}' 'data.seed=${seed}' -m",
    ),
    Claim(
        5,
        "Cross-entropy pretraining writes: what it changes lies in the prediction subspace.",
        "Direction: the write ratio of its increments, each in the prediction subspace of the checkpoint"
        f" before it, the first left out, lies above {MARGIN}, over bases.",
        "weightgeom run experiment=trajectory seed=0,1,2 'model.seed=${seed}' 'data.seed=${seed}' -m",
    ),
    Claim(
        6,
        "The more contrastive the objective (the graded control), the less it writes.",
        "Direction: the rank correlation over objectives of the write ratio with the effective number of"
        " alternatives that carry gradient is positive; p by permuting objectives, alike in every seed."
        f" Needs {OBJECTIVES} objectives.",
        "weightgeom run experiment=graded_control -m",
    ),
    Claim(
        7,
        "The cause is the accumulation of anisotropic gradients: the base's mean gradient forecasts the"
        " geometry of the update.",
        "Direction: Pearson's correlation of the measured ratio with the forecast that belongs to the"
        " training's optimizer, over layers, matrices and trainings, is positive; by the jackknife over"
        f" trainings. Needs {RUNS} trainings.",
        "weightgeom run objective=dpo,sft seed=0,1,2 'probe=[rsf,behaviour,moments]' -m",
    ),
    Claim(
        8,
        "Rank-1 edits along the concentrated direction do more than random ones of equal output energy.",
        "Direction: the geometric mean over places of the divergence (KL) from the unedited model over the"
        " median of the random edits, at the largest strength, lies above 1, over trainings. Edits of equal"
        " Frobenius norm are shown, and not judged.",
        "weightgeom run experiment=causal intervention.rank1.match=output seed=0,1,2 -m",
    ),
    Claim(
        9,
        "The behaviour lies in the concentrated part of the update: removing it undoes more than removing"
        " random parts.",
        "Direction: the change of the preference margin by the removal, less that of the median control, the"
        " mean over dimensions k, lies below 0, over trainings.",
        "weightgeom run experiment=causal seed=0,1,2 -m",
    ),
)

"""The claims of arXiv:2605.16600, from its abstract, and by which rule of ours a study agrees with each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """What the paper says, when we say that a study agrees with it, and what to run to test it."""

    number: int
    statement: str
    rule: str
    test: str


CLAIMS = (
    Claim(
        1,
        "Alignment's updates concentrate in the read pathway: in what q and k (and v and up) read.",
        "Agrees if the ratio of q and that of k, each the mean over layers and seeds, lie more than two of"
        " the rotation null's standard deviations above its mean.",
        "python run.py objective=dpo",
    ),
    Claim(
        2,
        "In the write pathway (o, down) they stay near-isotropic against the prediction subspace.",
        "Agrees if the mean ratio over o, down, layers and seeds lies no more than two of the null's standard"
        " deviations above its mean, or below half of the ratio of pretraining (of cross-entropy, where"
        " pretraining was not measured).",
        "python run.py objective=dpo",
    ),
    Claim(
        3,
        "Cross-entropy pretraining writes: its updates concentrate in the prediction subspace more than"
        " alignment's.",
        "Agrees if the write ratio of pretraining exceeds that of the alignment in every run; likewise for"
        " other cross-entropy trainings on the same data, seed by seed.",
        "python run.py objective=dpo,ce seed=0,1,2 -m",
    ),
    Claim(
        4,
        "The more contrastive the objective (the graded control), the less it writes.",
        "Agrees if over runs the write ratio rises with the measured participation ratio of the logit"
        " gradient (1: sharp, all of it on one token; more: spread over so many) by Spearman's rank"
        " correlation, p ≤ 0.05. Tested with three objectives and five runs or more.",
        "python run.py experiment=graded_control -m",
    ),
    Claim(
        5,
        "The cause is the accumulation of anisotropic gradients: what the base's moments lead to expect is"
        " what is measured.",
        "Agrees if the 95 % interval of Pearson's correlation between the forecast of the base's mean"
        " gradient and the measured ratio, over layers, matrices and runs, lies above 0.",
        "python run.py 'probe=[rsf,behaviour,moments]'",
    ),
    Claim(
        6,
        "Rank-1 edits along the concentrated direction do more than matched random ones, and those along"
        " the bottom direction do least.",
        "Agrees if, at the largest strength, more than half of the places (layer by matrix by run) have"
        " p ≤ 0.05 against random directions by KL from the unedited model; for the bottom direction, if it"
        " does less than every other arm in more than half of the places.",
        "python run.py experiment=causal",
    ),
    Claim(
        7,
        "The behaviour lies in the concentrated part of the update: to remove it undoes more than to remove"
        " random parts.",
        "Agrees if, in more than half of the removals (dimension k by run), the preference margin falls"
        " further than under the median control and p ≤ 0.05; against random subspaces of the same dimension,"
        " and of the same removed energy.",
        "python run.py experiment=causal",
    ),
)

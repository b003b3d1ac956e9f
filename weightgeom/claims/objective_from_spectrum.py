"""The claim of arXiv:2604.08844v1 that the spectrum of an update tells the objective of its training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, permutations
from statistics import mean, pstdev
from typing import TYPE_CHECKING, ClassVar

from weightgeom.analysis.referee import EXPLAINED, SDS, UNTESTABLE, Finding, Update
from weightgeom.analysis.rules import CONTRADICTED, SUPPORTED
from weightgeom.analysis.trainings import training_of
from weightgeom.table import whole_matrices

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

DIVISIONS = 2000  # of the labels among the trainings at most


@dataclass(frozen=True)
class ObjectiveFromSpectrum:
    """Seeds of an objective are near to each other in the participation ratios of their updates."""

    paper: ClassVar[str] = "arXiv:2604.08844v1"
    statement: ClassVar[str] = "Spectral summaries of an update tell the objective that it was trained on."
    published: ClassVar[str] = (
        "AUC of about 1.00 for all pairs of objectives within DPO (Llama-3.2-3B-Instruct, 38 LoRA adapters),"
        " and of about 0 from DPO to another method; by the abstract"
    )
    about: ClassVar[str] = ""
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {"alignment": ("participation_ratio", "delta_norm")}
    rule: ClassVar[str] = (
        "of two trainings or more with three seeds each, from one base: the share of updates that are nearest"
        " to their own training's mean, each left out of it in turn, by the logarithms of all matrices'"
        " participation ratios; contradicted if it is not above that of shuffled labels; explained by its"
        f" null if it is within {SDS} standard deviations of it, or the matrices' norms alone tell as many;"
        " supported otherwise"
    )

    def judged(self, update: Update) -> Finding:
        """Against shuffled labels, and against the norms of the updates."""
        table = update.tables["alignment"]
        spectra, norms = (_features(table, quantity) for quantity in self.needs["alignment"])
        labels = [training_of(str(name)) for name in spectra.index]
        sizes = {label: labels.count(label) for label in labels}
        if len(sizes) < 2 or min(sizes.values()) < 3:
            detail = "it takes two trainings with three seeds each, of weightgeom align"
            return Finding(UNTESTABLE, "accuracy", detail=detail)
        ours, by_norm = (accuracy(part.to_numpy(), labels) for part in (spectra, norms))
        shuffled = [accuracy(spectra.to_numpy(), others) for others in _shuffled(labels)]
        null, sd = mean(shuffled), pstdev(shuffled)
        explained = ours - null <= SDS * sd or by_norm >= ours
        verdict = CONTRADICTED if ours <= null else EXPLAINED if explained else SUPPORTED
        detail = (
            f"spectra give the training of {ours:.0%} of {len(labels)} updates, norms of {by_norm:.0%},"
            f" shuffled labels of {null:.0%}"
        )
        return Finding(verdict, "accuracy", ours, null, sd, n=len(labels), detail=detail)


def accuracy(features: "np.ndarray", labels: Sequence[str]) -> float:
    """The share of rows that are nearest to the mean of the other rows with their label."""
    import numpy as np

    of = np.array(labels)
    right = 0
    for index, own in enumerate(labels):
        others = np.arange(len(labels)) != index
        distances = {
            label: float(np.linalg.norm(features[index] - features[others & (of == label)].mean(0)))
            for label in dict.fromkeys(labels)
        }
        right += min(distances, key=lambda label: distances[label]) == own
    return right / len(labels)


def _features(table: "pd.DataFrame", quantity: str) -> "pd.DataFrame":
    """Logarithms by training and matrix; matrices that one training lacks are left out."""
    import numpy as np

    rows = whole_matrices(table.loc[(table["quantity"] == quantity) & (table["matrix"] != "")])
    keys = ["layer", "matrix", "expert"]
    rows = rows.assign(expert=rows["expert"].fillna(-1))
    wide = rows.pivot(index="treatment", columns=keys, values="value").dropna(axis=1)
    return np.log(wide)  # pyright: ignore[reportReturnType] (NumPy's hint is an array; of a frame it is a frame)


def _shuffled(labels: Sequence[str]) -> list[tuple[str, ...]]:
    """Different arrangements of the labels: all of them where they are few, and drawn ones otherwise."""
    import numpy as np

    if len(labels) <= 7:
        return list(dict.fromkeys(islice(permutations(labels), 10**4)))[:DIVISIONS]
    generator = np.random.default_rng(0)
    return [tuple(generator.permutation(labels)) for _ in range(DIVISIONS // 10)]

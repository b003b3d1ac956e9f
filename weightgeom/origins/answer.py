"""The origin of one update: its likelihoods, or the reason why it cannot be told."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from weightgeom.bases.sources import plain_config, source_of
from weightgeom.bases.trainings import end_weights
from weightgeom.models.residual import architecture_of
from weightgeom.origins.classifier import AXES, PLACE, Classifier, measurements
from weightgeom.origins.features import SIZE, features

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    Checkpoint = str | Path | PreTrainedModel | Mapping[str, torch.Tensor | np.ndarray]

KNOWN = Path(__file__).with_name("known.parquet")  # written by benchmarks/origin.py


@dataclass(frozen=True)
class Origin:
    """Which kind of training made an update.

    `answer` is the one origin that fits, or None with a `reason`. `likelihoods` sum to 1 over the known
    origins, given that it is one of them and with equal weights beforehand; `fits` is the set of origins that
    cannot be ruled out, which holds the true one for nine of ten updates of held-out settings. Both are empty
    where the update lies outside of the known ones. Origins are `ce`, `dpo`, `kto` and `rl`, each also as an
    adapter (`dpo+lora`), `noise` (Gaussian) and `rotated` (the spectrum of a training in random directions).
    """

    answer: str | None
    reason: str
    likelihoods: Mapping[str, float]
    fits: tuple[str, ...]
    relative_norm: float  # ‖dW‖ / ‖W‖ over the matrices of the residual stream

    @property
    def lora(self) -> float:
        """The likelihood that an adapter was trained, by whatever objective."""
        return sum((value for name, value in self.likelihoods.items() if _is_adapter(name)), 0.0)

    @property
    def noise(self) -> float:
        """The likelihood that no training made it."""
        return sum((value for name, value in self.likelihoods.items() if name.startswith(RANDOM)), 0.0)


RANDOM = ("noise", "rotated")


def _is_adapter(name: str) -> bool:
    return name.endswith("+lora") and not name.startswith(RANDOM)


def origin(
    before: "Checkpoint",
    after: "Checkpoint",
    *,
    config: "PreTrainedConfig | None" = None,
    known: str | Path | None = None,
) -> Origin:
    """Judge which kind of training made the update from one checkpoint to another, without any text.

    Checkpoints and `config` are as in `weightgeom.measure`. The measurements are those of
    `weightgeom.origins.features.features`, the likelihoods and the rule of
    `weightgeom.origins.classifier.Classifier`, fitted to the table `known`: by default small networks trained
    on the embedded world. A network of another type, width or number of layers than those has no answer.

    Examples:
        >>> found = origin("base", "aligned")
        >>> found.answer or found.reason

    Raises:
        FileNotFoundError: if a directory, its weights or the table is missing.
        NotImplementedError: if the model's type has no residual-stream map.
        ValueError: if the two differ in a name or a shape, if nothing has moved, or if the table is no table
            of known updates.
    """
    import pandas as pd

    start, end = source_of(before, "before"), source_of(after, "after")
    if start.is_adapter:
        raise ValueError(f"before={before} is an adapter: give its base model there instead")
    given = None if config is None else plain_config(config)
    settled = next((each for each in (start.config, given, end.config) if each is not None), None)
    if settled is None:
        raise ValueError(
            "a state dict says nothing of its network: add config=network.config, or"
            " config=AutoConfig.from_pretrained(NAME)"
        )
    table = _table(Path(known) if known is not None else KNOWN)
    architecture = architecture_of(settled)
    base = start.params(architecture)
    moved = end_weights(end, before, base, architecture)
    if (
        reason := _out_of_scope(table, settled.model_type, architecture.d_model, architecture.n_layers)
    ) != "":
        return Origin(None, reason, {}, (), float("nan"))
    measured = features(base, moved, settled)
    classifier = _classifier(Path(known) if known is not None else KNOWN)
    (judged,) = classifier.judge(pd.DataFrame([measured]))
    if judged.outside:
        reason = (
            f"the update is unlike all {len(table)} known ones: {judged.distance:.1f} times as far from the"
            " nearest origin as 99 % of held-out ones are at most"
        )
        return Origin(None, reason, {}, (), measured[SIZE])
    if judged.answer is None:
        reason = f"{', '.join(judged.fits)} all fit" if judged.fits else "no origin fits"
        return Origin(None, reason, judged.likelihoods, judged.fits, measured[SIZE])
    return Origin(judged.answer, "", judged.likelihoods, judged.fits, measured[SIZE])


@lru_cache(maxsize=4)
def _table(path: Path) -> "pd.DataFrame":
    import pandas as pd

    table = pd.read_parquet(path)
    if missing := [name for name in PLACE if name not in table.columns]:
        raise ValueError(
            f"{path} lacks the column {missing[0]}: a table of known updates has {', '.join(PLACE)} and the"
            f" measurements, as benchmarks/origin.py writes it; settings are held out by {', '.join(AXES)}"
        )
    return table


@lru_cache(maxsize=4)
def _classifier(path: Path) -> Classifier:
    table = _table(path)
    return Classifier.of(table, measurements(table))


def _out_of_scope(known: "pd.DataFrame", model_type: str, d_model: int, layers: int) -> str:
    """Why nothing can be said of such a network; "" if something can."""
    types = sorted(set(known["model_type"]))
    widths, depths = ((int(known[name].min()), int(known[name].max())) for name in ("d_model", "layers"))
    inside = widths[0] <= d_model <= widths[1] and depths[0] <= layers <= depths[1]
    if model_type in types and inside:
        return ""
    return (
        f"{model_type} of width {d_model} with {layers} layers is outside of the known updates, which are of"
        f" {', '.join(types)} of width {widths[0]} to {widths[1]} with {depths[0]} to {depths[1]} layers:"
        " give a table of such networks as known"
    )

"""The geometry of transformer weights: how a training stage changed the matrices of a model.

>>> import weightgeom as wg
>>> table = wg.measure("base", "aligned", texts=texts, probes=["rsf"], k=16)

Everything is imported when it is first asked for, so that `import weightgeom` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightgeom.analysis.run_record import Run, read_run
    from weightgeom.bases.trainings import alignments
    from weightgeom.estimators.rotation import RotationTest, rotation_test
    from weightgeom.geometry.subspace import Subspace
    from weightgeom.library import measure, subspaces
    from weightgeom.origins.answer import Origin, origin

    __version__: str

__all__ = [
    "Origin",
    "RotationTest",
    "Run",
    "Subspace",
    "__version__",
    "alignments",
    "measure",
    "origin",
    "read_run",
    "rotation_test",
    "subspaces",
]
# A module must not have the name of something in it that is public here: importing it would hide that.
PLACES = {
    "Origin": "weightgeom.origins.answer",
    "RotationTest": "weightgeom.estimators.rotation",
    "Run": "weightgeom.analysis.run_record",
    "Subspace": "weightgeom.geometry.subspace",
    "alignments": "weightgeom.bases.trainings",
    "measure": "weightgeom.library",
    "origin": "weightgeom.origins.answer",
    "read_run": "weightgeom.analysis.run_record",
    "rotation_test": "weightgeom.estimators.rotation",
    "subspaces": "weightgeom.library",
}


if not TYPE_CHECKING:  # else any misspelt name would have a type

    def __getattr__(name: str) -> object:
        if name == "__version__":
            return import_module("importlib.metadata").version(__name__)
        if name not in PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

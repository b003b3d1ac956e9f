"""Code of a user's own, outside the repository: a package and a loose file, with a config directory."""

from pathlib import Path
from textwrap import dedent

SOURCES = {
    "mylab/__init__.py": '"""A lab\'s own code."""\n\nfrom mylab import unrelated\n',
    "mylab/probe.py": '''
        """Norms of matrices."""

        from typing import ClassVar

        from pydantic.dataclasses import dataclass

        from weightgeom.declarations import ProbeDeclaration
        from weightgeom.table import row

        from . import scaling


        @dataclass(frozen=True)
        class Norm:
            """The norm of every matrix, times `scale`."""

            declaration: ClassVar[ProbeDeclaration] = ProbeDeclaration("norm")
            scale: float = 1.0

            def check(self, architecture):
                """Every model will do."""

            def measurement(self, setting):
                """The measurement of one checkpoint."""
                import loose

                def measure(params):
                    return [
                        row("norm", scaling.by(self.scale, loose.size(matrix.of(params))), n=1,
                            **matrix.table_columns, subspace="residual")
                        for matrix in setting.model.architecture.matrices
                    ]

                return measure
        ''',
    "mylab/scaling.py": "def by(scale, value):\n    return scale * value\n",
    "loose.py": "def size(matrix):\n    return float(matrix.norm())\n",
    "mylab/objective.py": '''
        """Cross-entropy on the chosen responses."""

        from pydantic.dataclasses import dataclass

        from weightgeom.objectives.ce import CE


        @dataclass(frozen=True)
        class Chosen(CE):
            """Cross-entropy on the chosen responses alone."""

            train_on: str = "chosen"
        ''',
    "mylab/intervention.py": '''
        """An edit that does as it is told."""

        from typing import ClassVar

        from pydantic.dataclasses import dataclass

        from weightgeom.declarations import InterventionDeclaration
        from weightgeom.table import arm_columns, row


        @dataclass(frozen=True)
        class Nudge:
            """One arm and its control in every layer."""

            declaration: ClassVar = InterventionDeclaration(("kl_from_unedited",), ("random",))
            effect: float = 0.5

            def check(self, architecture):
                """Every model will do."""

            def arms(self, architecture):
                """A treatment and a control."""
                return 2

            def rows(self, setting, log):
                """The results of both."""
                place = {"layer": 0, "matrix": "q", "role": "read", "k": 4}
                comparison = arm_columns("nudge", "1", against="random")
                log({}, 2)
                return [
                    {"step": setting.last, **one}
                    for one in (
                        row("kl_from_unedited", self.effect, n=4, **arm_columns("nudge", "1"), **place),
                        row("kl_from_unedited", 0.1, n=4, **arm_columns("random", "1", draw=0), **place),
                        row("kl_from_unedited_p_value", 0.5, n=1, **comparison, **place),
                        row("kl_from_unedited_q_value", 0.5, n=1, **comparison, **place),
                    )
                ]
        ''',
    "mylab/data.py": '''
        """A few examples."""

        from dataclasses import dataclass

        from weightgeom.data.world import World


        @dataclass(frozen=True)
        class Few:
            """The world, in small."""

            documents: int = 60

            def examples(self):
                """Read nothing; draw it."""
                return World(documents=self.documents, pairs=24, heldout=8).examples()
        ''',
    "mylab/unrelated.py": "SIZE = 1\n",
    "conf/probe/norm.yaml": "norm:\n  _target_: mylab.probe.Norm\n",
    "conf/objective/chosen.yaml": "_target_: mylab.objective.Chosen\n",
    "conf/intervention/nudge.yaml": "nudge:\n  _target_: mylab.intervention.Nudge\n",
    "conf/data/few.yaml": "_target_: mylab.data.Few\n",
}


def write_lab(directory: Path) -> Path:
    """Write the code and its config directory, `conf`, into `directory`."""
    for name, source in SOURCES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(dedent(source).lstrip("\n"))
    return directory


def change(path: Path, old: str, new: str) -> None:
    """Put `new` for `old` in a file."""
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))

"""False verdicts between trainings that differ in nothing but their seed.

    python benchmarks/seeds_null.py DIRECTORY [TRAININGS] [DRAWS]

Trains TRAININGS (20) small models by DPO from one base, seed by seed, and measures them. Then DRAWS (2000)
times takes two groups of three at random, calls one of them another objective, and asks what a report asks of
two objectives: does one write less, do they read alike, is the order of writes that of five groups? Prints
how often the tests reject, with the binomial interval, and exits with 1 if one rejects too often.
"""

import subprocess
import sys
from math import log
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from runners.report import collect
from weightgeom.analysis.evidence import direction, equivalence, rank_correlation
from weightgeom.analysis.rules import LEVEL, MARGIN

ROOT = Path(__file__).parents[1]
SMALL = (
    "model.d_model=64 model.d_mlp=128 model.layers=2 model.heads=2 model.pretraining.steps=150"
    " training.steps=32 probe=[rsf] probe.rsf.resamples=0 probe.rsf.prompts=0 name=seeds device=cpu"
).split()


def ratios(directory: Path, trainings: int) -> pd.DataFrame:
    """The mean ratio of every training by pathway: a row for each, columns read and write."""
    store = f"sqlite:///{directory.absolute()}/mlflow.db"
    seeds = ",".join(map(str, range(trainings)))
    command = [sys.executable, str(ROOT / "run.py"), *SMALL, f"seed={seeds}", f"outputs={directory}", "-m"]
    subprocess.run(command, check=True, cwd=ROOT)
    rows = collect("seeds", tracking_uri=store)
    rows = rows[(rows["table"] == "rsf") & (rows["trajectory"] == "training")]
    rows = rows[(rows["quantity"] == "ratio_mean") & (rows["matrix"] == "")]
    last = rows[rows["step"] == rows["step"].max()]
    return last.pivot_table(index="seed", columns="role", values="value")


def rejected(found: pd.DataFrame, generator: np.random.Generator) -> dict[str, bool]:
    """One draw: what two groups of three, and five of three, are found to differ in."""
    logs = np.log(found.to_numpy())[generator.permutation(len(found))]
    roles = {role: number for number, role in enumerate(found.columns)}
    reads, writes = logs[:, roles["read"]], logs[:, roles["write"]]
    less = direction(list(writes[:3] - writes[3:6]), below=True)
    shifted = equivalence(list(reads[:3] - reads[3:6] + log(MARGIN)), log(MARGIN))
    groups = np.repeat(np.arange(5), 3)
    table = pd.DataFrame({
        "run": groups, "seed": np.tile(np.arange(3), 5), "ratio": writes[:15],
        "sharpness": np.repeat(generator.permutation(5), 3),
    })  # fmt: skip
    return {
        "one writes less (direction, 3 pairs)": less is not None and less.p_for <= LEVEL,
        "the reads are alike, at the margin (equivalence)": shifted is not None and shifted.p_for <= LEVEL,
        "the order of five objectives": rank_correlation(table)[1] <= LEVEL,
    }


def main() -> int:
    """Train, draw and print."""
    directory = Path(sys.argv[1])
    trainings, draws = (int(text) for text in (sys.argv[2:4] + ["20", "2000"][len(sys.argv) - 2 :])[:2])
    found = ratios(directory, trainings)
    print(found.describe().loc[["mean", "std", "min", "max"]].round(3).to_string())
    generator = np.random.default_rng(0)
    counts: dict[str, int] = {}
    for _ in range(draws):
        for what, happened in rejected(found, generator).items():
            counts[what] = counts.get(what, 0) + happened
    bad = False
    for what, count in counts.items():
        interval = binomtest(count, draws).proportion_ci(0.99)
        bad |= interval.low > LEVEL
        print(f"{what}: {count / draws:.3f} [{interval.low:.3f}, {interval.high:.3f}] of {draws} draws")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())

"""The command `python -m weightgeom.calibrate`: a table of all rates, and 1 if one is not as it should be."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from weightgeom.calibrate.simulations import Rate, rates

HEAD = """# Calibration

How often p-values, intervals and verdicts err where the truth is known, in {draws} simulations each
(ten times as many where no matrix is simulated, half as many of whole reports). Rates are next to their
nominal value, with Clopper and Pearson's 99.9 % interval; a power has no nominal value. Made by

```bash
{command}
```

"""


def main(arguments: Sequence[str]) -> int:
    """`[--draws N] [--d D ...] [--seed S] [--write FILE]`."""
    parser = argparse.ArgumentParser(
        prog="python -m weightgeom.calibrate",
        description="Simulate every p-value, interval and verdict where the truth is known.",
    )
    parser.add_argument("--draws", type=int, default=400, help="simulations of each")
    parser.add_argument("--d", type=int, nargs="+", default=[128], help="widths of the residual stream")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--write", type=Path, help="a Markdown page to write, such as docs/concepts/calibration.md"
    )
    asked = parser.parse_args(arguments)
    if asked.draws < 1 or min(asked.d) < 8:
        parser.error("--draws must be 1 or more, and each --d at least 8")
    simulated = []
    for rate in rates(asked.draws, tuple(asked.d), asked.seed):
        simulated.append(rate)
        print(line(rate), flush=True)
    if asked.write is not None:
        command = f"python -m weightgeom.calibrate --draws {asked.draws} --d {' '.join(map(str, asked.d))}"
        head = HEAD.format(draws=asked.draws, command=f"{command} --write {asked.write}")
        asked.write.write_text(head + table(simulated))
    off = [rate for rate in simulated if rate.holds is False]
    print(f"{len(simulated)} rates, {len(off)} not as they should be", file=sys.stderr)
    return 1 if off else 0


def line(rate: Rate) -> str:
    """A rate as a row of Markdown."""
    low, high = rate.interval
    nominal = "-" if rate.nominal is None else f"{rate.nominal:.3g}"
    nominal = nominal if rate.sided == "equal" else f"{rate.sided} {nominal}"
    sign = {None: "", True: "yes", False: "**no**"}[rate.holds]
    return f"| {rate.what} | {rate.shape} | {nominal} | {rate.rate:.3f} [{low:.3f}, {high:.3f}] | {sign} |"


def table(simulated: Iterable[Rate]) -> str:
    """All rates as a table of Markdown."""
    head = ["| what | shape | nominal | rate | as it should be |", "|---|---|---|---|---|"]
    return "\n".join([*head, *map(line, simulated)]) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

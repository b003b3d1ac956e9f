"""Flips random bits in the files of finished stages, and counts those that a later run would believe.

    python benchmarks/bit_flips.py OUTPUTS [FLIPS]

Each flip keeps size and time of modification, and is undone before the next one. Half of them hit tables,
half weights. Exits with 1 if one was believed.
"""

import os
import random
import sys
from pathlib import Path

from runners.pipeline.store import flaw


def main(outputs: Path, flips: int) -> int:
    """Print how many of `flips` bits were believed, by kind of file; the exit code."""
    rng = random.Random(0)
    stages = [path.parent for path in outputs.glob("*/*/DONE")]
    believed = 0
    for kind in (".parquet", ".safetensors"):
        files = [(stage, path) for stage in stages for path in sorted(stage.rglob(f"*{kind}"))]
        missed = 0
        for _ in range(flips // 2):
            stage, path = rng.choice(files)
            stat, content = path.stat(), path.read_bytes()
            bit = rng.randrange(8 * len(content))
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            missed += not flaw(stage)
            path.write_bytes(content)
        print(f"{flips // 2} flips in {len(files)} files {kind}: {missed} believed")
        believed += missed
    return 1 if believed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 400))

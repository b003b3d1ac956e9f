"""The command `weightgeom report NAME`: tables, figures and one page of a study."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportReturnType=false

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from runners.errors import replace_unprintable
from runners.report.make import make
from runners.report.read import _store


def main(arguments: Sequence[str]) -> int:
    """`NAME... [--outputs OUTPUTS] [--tracking-uri URI]`: prints where the page is; 1 if there is none."""
    parser = argparse.ArgumentParser(
        prog="weightgeom report",
        description="Tables, figures and one page from the runs of MLflow experiments.",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="of an experiment: the value of `name=`")
    parser.add_argument(
        "--outputs", type=Path, default=Path("outputs"), help="the report goes to OUTPUTS/report/NAME"
    )
    parser.add_argument(
        "--tracking-uri", help="default: MLFLOW_TRACKING_URI, else sqlite in OUTPUTS/mlflow.db"
    )
    chosen = parser.parse_args(arguments)
    replace_unprintable()
    try:
        page = make(chosen.names, _store(chosen.tracking_uri, chosen.outputs), chosen.outputs)
    except (KeyError, ValueError, OSError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 1
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Standard output in any encoding."""

import sys
from io import TextIOWrapper


def replace_unprintable() -> None:
    """Print a question mark for a character that the encoding of standard output lacks, as in ASCII.

    Otherwise a run whose work is done would end in an error where it prints its table.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")

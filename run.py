"""`python run.py ...` in a checkout: the same as the installed command `weightgeom run ...`."""

import sys

from runners.cli.run import main

if __name__ == "__main__":
    main(sys.argv[1:])

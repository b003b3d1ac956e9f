"""Private parts of other libraries, each behind one function that says whose it is and why it is needed.

Nothing else in `weightgeom` or `runners` reads or patches a private name of another library; Hydra's are
in `runners.launcher.hydra_doors`, as only runners may import it. A test of every function fails with the
name that a new version has moved.
"""

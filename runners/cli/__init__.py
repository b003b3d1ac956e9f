"""The command `weightgeom`, and the application that `python run.py` starts as well."""

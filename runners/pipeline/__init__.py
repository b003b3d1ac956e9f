"""Pipeline: one run from its base to its tables, in stages that are made once."""

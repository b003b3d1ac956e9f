"""Which packages go into a wheel; all else is in pyproject.toml."""

from setuptools import find_packages, setup

# The folder of choices is no package of Python's, and lies in the wheel inside of one.
setup(
    packages=[*find_packages(include=["weightgeom*", "runners*"]), "runners.conf"],
    package_dir={"runners.conf": "conf"},
)

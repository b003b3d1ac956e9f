"""Published claims about weight updates, one a file, which `experiment=referee` judges."""

import pkgutil


def published() -> list[str]:
    """The classes of all claims here: each file holds one, named like the file."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [f"{__name__}.{name}.{name.title().replace('_', '')}" for name in names]

import pytest

from weightgeom.interfaces import Setting
from weightgeom.training.config import Training


@pytest.fixture
def at(model, examples):
    """A setting between two models."""

    def setting(start, end=None, of=model, objective=None):
        training = None if objective is None else Training(max_length=48)
        return Setting(of, start, end or start, False, examples, 3, objective, training)

    return setting

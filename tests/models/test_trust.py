import json
import sys
from pathlib import Path

import pytest
from networks import save

import weightgeom.architectures.gpt_neox as gpt_neox
from weightgeom.bases.hub import fetch
from weightgeom.models.loading import load, load_architecture

CODE = """
from pathlib import Path
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM


class Config(GPTNeoXConfig):
    model_type = "own_neox"

class Model(GPTNeoXForCausalLM):
    config_class = Config
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose network is in code of its own."""
    directory = save("gpt_neox", tmp_path / "own")
    config = json.loads((directory / "config.json").read_text())
    code = {"AutoConfig": "own_code.Config", "AutoModelForCausalLM": "own_code.Model"}
    config |= {"model_type": "own_neox", "auto_map": code, "architectures": ["Model"]}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own_code.py").write_text(CODE)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setitem(sys.modules, "weightgeom.architectures.own_neox", gpt_neox)
    return directory


def test_code_of_a_checkpoint_runs_on_request_alone(own: Path) -> None:
    with pytest.raises(
        ValueError, match=r"config\.json needs code of its own: read it, and add \+\+model\.trust"
    ):
        load_architecture(own)
    assert fetch(str(own)) == own
    with pytest.raises(ValueError, match="needs code of its own"):
        load(own, "cpu")
    assert fetch(str(own), code=True) == own
    model = load(own, "cpu")
    assert type(model.network).__module__.endswith("own_code")
    assert model.architecture.n_layers == 2
    assert set(model.params(own)) == {name for name, _ in model.network.named_parameters()}

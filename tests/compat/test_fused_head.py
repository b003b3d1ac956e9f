"""TRL asks for its fused head, and reads it, by the names that stand here."""

import inspect
from typing import Any

import pytest
import torch
from trl import DPOTrainer, KTOTrainer, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from weightgeom.compat.fused_head import FusedOutputs, first_rows, with_fused_head


@pytest.mark.parametrize("trainer", [SFTTrainer, DPOTrainer, KTOTrainer])
def test_trl_asks_for_its_fused_head_by_this_name(trainer):
    moved = f"trl moved the fused head of {trainer.__name__}: change weightgeom/compat/fused_head.py"
    assert "fused_lm_head=True" in inspect.getsource(trainer), moved


@pytest.mark.parametrize("name", list(FusedOutputs.__dataclass_fields__))
def test_the_outputs_have_trls_names(name):
    moved = f"trl moved the output {name} of its fused head: change weightgeom/compat/fused_head.py"
    assert name in FusedCausalLMOutput.__dataclass_fields__, moved


@pytest.mark.parametrize(
    ("trainer", "name"), [(DPOTrainer, "use_weighting"), (SFTTrainer, "aux_loss_enabled")]
)
def test_trl_says_what_else_enters_a_loss_by_these_names(trainer, name):
    moved = f"trl moved {name} of {trainer.__name__}: change weightgeom/compat/fused_head.py"
    assert f"self.{name}" in inspect.getsource(trainer), moved


def test_the_head_answers_for_labels_alone_and_the_network_for_the_rest():
    def head(labels: Any, **inputs: Any) -> Any:
        return "head", labels, inputs

    network = with_fused_head(lambda **inputs: inputs, head)
    labels = torch.ones(1)
    assert network(x=1) == {"x": 1}
    assert network(x=1, labels=labels) == {"x": 1, "labels": labels}
    assert network(x=1, labels=labels, fused_lm_head=True) == ("head", labels, {"x": 1})
    assert network(x=1, fused_lm_head=True) == {"x": 1}


def test_the_first_rows_of_the_outputs_are_those_of_every_column():
    columns = {name: torch.arange(6).view(3, 2) for name in FusedOutputs.__dataclass_fields__}
    outputs = first_rows(FusedCausalLMOutput(**columns), 2)
    assert outputs.aux_loss is None and outputs.mean_logits is not None
    assert outputs.log_probs.tolist() == outputs.mean_logits.tolist() == [[0, 1], [2, 3]]

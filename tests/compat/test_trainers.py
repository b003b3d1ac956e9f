"""Each door fails with the name that a new version of transformers or TRL has moved."""

import inspect
import logging

import pytest
import small
import torch
from transformers import Trainer
from transformers import trainer as transformers_trainer
from trl import DPOTrainer, KTOTrainer, SFTTrainer

from weightgeom.compat.trainers import (
    add_metric,
    lacking_weights_allowed,
    prepared,
    running_sums,
    set_running_sums,
)
from weightgeom.objectives.ce import CE
from weightgeom.objectives.dpo import DPO
from weightgeom.objectives.kto import KTO
from weightgeom.training.config import Training


@pytest.mark.parametrize(("library", "owner", "name"), [
    ("transformers", transformers_trainer, "_tr_loss"),
    ("transformers", transformers_trainer, "_globalstep_last_logged"),
    ("transformers", Trainer, "_prepare_inputs"),
    ("trl", SFTTrainer, "_metrics"),
    ("trl", SFTTrainer, "_total_train_tokens"),
    ("trl", DPOTrainer, "_metrics"),
    ("trl", DPOTrainer, "_total_train_tokens"),
    ("trl", DPOTrainer, "_compute_loss"),
    ("trl", DPOTrainer, "precompute_ref_logps"),
    ("trl", KTOTrainer, "_metrics"),
    ("trl", KTOTrainer, "_total_train_tokens"),
])  # fmt: skip
def test_the_private_names_of_trainers_are_where_they_were(library, owner, name):
    source = inspect.getsource(owner)
    assert name in source, f"{library} moved {name} of {owner.__name__}: change weightgeom/compat/trainers.py"


@pytest.mark.parametrize("objective", [CE("chosen"), DPO(), KTO()])
def test_the_sums_of_a_trainer_go_over_to_another_and_into_its_log(objective, examples, tokenizer, tmp_path):
    def trainer():
        arguments = Training(max_length=48, batch_size=2).arguments(tmp_path, 0, "cpu")
        made = objective.trainer(small.network(tokenizer), tokenizer, examples, arguments)
        made._tr_loss, made._globalstep_last_logged = torch.tensor(0.0), 0  # as when a training begins
        return made

    earlier, later = trainer(), trainer()
    earlier._tr_loss, earlier._globalstep_last_logged, earlier._total_train_tokens = torch.tensor(1.5), 3, 7
    add_metric(earlier, "entropy", 2.0)
    add_metric(earlier, "entropy", 4.0)
    sums = running_sums(earlier)
    assert sums == {"loss": 1.5, "logged": 3, "metrics": {"entropy": [2.0, 4.0]}, "tokens": 7}
    set_running_sums(later, [sums], 0, 1)
    assert running_sums(later) == sums
    logs: dict[str, float] = {}
    later.log(logs)
    assert logs["entropy"] == 3.0, "trl moved its log of _metrics: change weightgeom/compat/trainers.py"
    batch = {"input_ids": torch.ones(1, 2, dtype=torch.long)}
    assert prepared(later, batch)["input_ids"].device == later.model.device


def test_only_the_warning_of_lacking_weights_is_passed_over():
    text = "There were missing keys in the checkpoint model loaded"
    moved = "transformers moved its warning of missing keys: change weightgeom/compat/trainers.py"
    assert text in inspect.getsource(transformers_trainer), moved
    logger = logging.getLogger(transformers_trainer.__name__)
    warning, other = (logging.makeLogRecord({"msg": message}) for message in (f"{text}: ['a'].", "another"))
    with lacking_weights_allowed():
        assert not logger.filter(warning) and logger.filter(other), moved
    assert logger.filter(warning)

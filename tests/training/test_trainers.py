import pytest
import small
from networks import CONFIGS
from transformers import AutoModelForCausalLM

from weightgeom.objectives.dpo import DPO
from weightgeom.objectives.kto import KTO
from weightgeom.training.config import Training
from weightgeom.training.fit import fit

EXAMPLES = small.WORLD.examples()
TOKENIZER = small.WORLD.tokenizer()


@pytest.mark.parametrize("objective", [DPO(), KTO()], ids=["dpo", "kto"])
def test_preferences_are_trained_on_without_dropout_also_where_dropout_is_no_module(objective, tmp_path):
    config = CONFIGS["opt"](len(TOKENIZER), 128)
    assert config.dropout == 0.1
    curves = small.Curves()
    fit(
        objective,
        AutoModelForCausalLM.from_config(config),
        TOKENIZER,
        EXAMPLES,
        Training(steps=1, batch_size=8, max_length=48, log_every=1),
        tmp_path,
        name="preferences",
        seed=0,
        device="cpu",
        log_metrics=curves,
    )
    assert curves.by_step[1]["loss"] == pytest.approx(objective.first_loss, abs=1e-6)

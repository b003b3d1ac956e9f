# pyright: reportArgumentType=false
import pytest
import small
import torch
from networks import CONFIGS
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from weightgeom.interfaces import Scored
from weightgeom.objectives.dpo import DPO
from weightgeom.objectives.kto import KTO
from weightgeom.training.config import Training
from weightgeom.training.fit import fit
from weightgeom.training.trainers import chosen_and_rejected

pytestmark = pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning")
PAD = 9
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


def batch() -> dict[str, torch.Tensor]:
    """Two pairs, the chosen responses a token longer than the rejected ones."""
    chosen, rejected = torch.tensor([[1, 2, 3, 4], [1, 2, 3, PAD]]), torch.tensor([[1, 2, 5], [1, 2, 6]])
    masks = {"chosen": (chosen != PAD).long(), "rejected": torch.ones_like(rejected)}
    labels = {"chosen": torch.tensor([[-100, -100, 3, 4], [-100, -100, 3, -100]])}
    labels["rejected"] = torch.tensor([[-100, -100, 5], [-100, -100, 6]])
    ids = {"chosen": chosen, "rejected": rejected}
    named = {"input_ids": ids, "attention_mask": masks, "labels": labels}
    return {f"{side}_{name}": sides[side] for name, sides in named.items() for side in ids}


def test_chosen_and_rejected_sequences_are_read_as_trls_trainers_read_them():
    from trl.experimental.cpo import CPOTrainer

    scored = chosen_and_rejected(batch(), PAD)
    theirs = CPOTrainer.concatenated_inputs(batch(), padding_value=PAD, device=torch.device("cpu"))
    ids, mask = scored.read(batch())
    assert_close(ids, theirs["concatenated_input_ids"])
    assert_close(mask, theirs["concatenated_attention_mask"])
    assert_close(scored.targets, theirs["concatenated_labels"] != -100)
    assert (scored.prompt, scored.terms) == ([0, 1, 0, 1], [1, 1])


def test_a_batch_is_read_under_its_own_names_where_no_others_are_given():
    inputs = {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.zeros(1, 2).long()}
    ids, mask = Scored(torch.ones(1, 2).bool(), [0], [1]).read(inputs)
    assert ids is inputs["input_ids"] and mask is inputs["attention_mask"]

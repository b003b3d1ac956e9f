# pyright: reportArgumentType=false
import logging
from dataclasses import replace

import pytest
import small
import torch
from networks import CONFIGS
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from trl import DPOTrainer, KTOTrainer

from weightgeom.interfaces import Scored
from weightgeom.objectives.dpo import DPO
from weightgeom.objectives.kto import KTO
from weightgeom.text.examples import Pair
from weightgeom.text.tokens import tokenized, tokenized_responses
from weightgeom.training.config import Training
from weightgeom.training.fit import fit, outdated_name_allowed
from weightgeom.training.trainers import chosen_and_rejected, preference_trainer, unpaired_trainer

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


CHATML = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <eos>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


def chats(number: int) -> list[Pair]:
    return [
        Pair(*([{"role": role, "content": str(text)}] for role, text in zip(ROLES, sides(pair), strict=True)))
        for pair in EXAMPLES.pairs[:number]
    ]


ROLES = ("user", "assistant", "assistant")


def sides(pair: Pair) -> tuple:
    return pair.prompt, pair.chosen, pair.rejected


def arguments(tmp_path, length: int = 48) -> dict:
    return Training(steps=1, batch_size=4, max_length=length).arguments(tmp_path, 0, "cpu")


def network(positions: int = 128):
    return AutoModelForCausalLM.from_config(CONFIGS["llama"](len(TOKENIZER), positions))


def test_the_trainers_get_the_tokens_that_are_measured_and_one_end_token(tmp_path):
    tokenizer = small.WORLD.tokenizer()
    tokenizer.chat_template = CHATML
    examples = replace(EXAMPLES, pairs=chats(6))
    kinds = ((preference_trainer, DPOTrainer), (unpaired_trainer, KTOTrainer))
    with outdated_name_allowed():
        made = [
            function(kind, network(), tokenizer, examples, arguments(tmp_path)) for function, kind in kinds
        ]
    rows = [
        tuple(row[f"{side}_ids"] for side in ("prompt", "chosen", "rejected"))
        for row in made[0].train_dataset
    ]
    assert rows == tokenized(examples.pairs, tokenizer)
    single = tokenized_responses(examples.pairs, tokenizer)
    both = [chosen for chosen, *_ in single] + [rejected for *_, rejected, _ in single]
    assert sorted(row["prompt_ids"] + row["completion_ids"] for row in made[1].train_dataset) == sorted(both)
    assert all(
        response.count(tokenizer.eos_token_id) == 1 for _, *responses in rows for response in responses
    )


def cut(lengths: list[int], limit: int, positions: int, caplog) -> list[tuple[int, str]]:
    """The level and the words of the report on pairs of these lengths, whose prompts have one token."""
    from weightgeom.training.trainers import _report_cut

    caplog.clear()
    with caplog.at_level(logging.INFO):
        _report_cut("pairs", [(1, length) for length in lengths], limit, network(positions))
    return [(record.levelno, record.getMessage()) for record in caplog.records]


def test_data_cut_by_more_than_a_tenth_are_a_warning_with_the_length_that_keeps_nine_tenths(caplog):
    # nine of ten lengths are at most 90, and 96 is the next multiple of 32
    lengths = list(range(10, 101, 10))
    counts = "10 pairs: 0 dropped (prompt of 48 tokens or more), 6 truncated to 48 tokens"
    assert cut(lengths, 48, 128, caplog) == [
        (logging.WARNING, f"{counts}: training.max_length=96 leaves 9 of 10 pairs whole")
    ]
    # the network has only 64 positions
    assert (
        cut(lengths, 48, 64, caplog)[0][1] == f"{counts}: training.max_length=64 leaves 6 of 10 pairs whole"
    )
    assert [level for level, _ in cut(lengths, 96, 128, caplog)] == [logging.INFO]


def test_prompts_that_are_all_too_long_are_refused_with_the_length_that_keeps_nine_tenths(tmp_path):
    message = (
        r"every prompt is 4 tokens or longer: raise training\.max_length \(training\.max_length=32 leaves"
    )
    with pytest.raises(ValueError, match=message):
        preference_trainer(DPOTrainer, network(), TOKENIZER, EXAMPLES, arguments(tmp_path, 4))

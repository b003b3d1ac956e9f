import logging
from dataclasses import replace

import pytest
import torch
from small import TRAINING, trainer_for

from weightgeom.objectives.ce import CE
from weightgeom.text.tokens import packed, responses


def first_loss(trainer) -> float:
    batch = next(iter(trainer.get_train_dataloader()))
    return float(trainer.compute_loss(trainer.model, batch).detach())


def test_on_chosen_responses_the_loss_is_the_mean_of_our_log_probs(tmp_path, model, examples):
    everything = replace(TRAINING, batch_size=len(examples.pairs))
    loss = first_loss(trainer_for(CE("chosen"), model, examples, tmp_path, everything))
    params = dict(model.network.named_parameters())
    log_probs = targets = 0.0
    for chosen, _ in responses(examples.pairs, model.tokenizer, 48):
        log_probs += float(model.log_probs(params, chosen).sum())
        targets += int(chosen.target[:, 1:].sum())
    torch.testing.assert_close(loss, -log_probs / targets, rtol=1e-5, atol=0)


def test_on_text_the_packed_sequences_are_those_that_the_probes_score(tmp_path, model, examples):
    trainer = trainer_for(CE("text"), model, examples, tmp_path)
    assert trainer.train_dataset is not None
    tokens = [token for row in trainer.train_dataset["input_ids"] for token in row]
    ours = packed(examples.text, model.tokenizer, 48, limit=10**9)
    stream = [batch.input_ids[batch.attention_mask.bool()] for batch in ours]
    # TRL shuffles the documents before packing, so that only their tokens can be compared.
    assert sorted(tokens)[:1000] == sorted(torch.cat(stream).tolist())[:1000]
    assert len(tokens) == sum(len(part) for part in stream)


def test_the_log_says_how_many_prompts_were_dropped_and_responses_cut(tmp_path, model, examples, caplog):
    short = replace(TRAINING, max_length=16)
    with caplog.at_level(logging.INFO):
        trainer = trainer_for(CE("chosen"), model, examples, tmp_path, short)
    assert trainer.train_dataset is not None
    lengths = [len(row) for row in trainer.train_dataset["input_ids"]]
    assert max(lengths) == 16
    assert f"{len(examples.pairs)} chosen responses: 0 dropped (prompt of 16 tokens or more)" in caplog.text
    with pytest.raises(ValueError, match=r"every prompt is 4 tokens or longer: raise training\.max_length"):
        trainer_for(CE("chosen"), model, examples, tmp_path, replace(TRAINING, max_length=4))


def test_auto_is_text_where_there_is_any_and_the_chosen_responses_otherwise(examples):
    assert CE().examples(examples) == "text"
    assert CE().examples(replace(examples, text=[])) == "chosen"


@pytest.mark.parametrize(("on", "part"), [("text", "text"), ("chosen", "pairs")])
def test_data_without_the_examples_are_refused(on, part, examples):
    needed = "text" if on == "text" else "preference pairs"
    with pytest.raises(ValueError, match=f"objective=ce on {on} needs {needed}, but world-style has none"):
        CE(on).check(replace(examples, **{part: []}))

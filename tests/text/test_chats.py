from dataclasses import replace
from pathlib import Path

import pytest
import small
from networks import save
from stored import no_stage, resized
from torch.testing import assert_close

from weightgeom.bases.pretrained import TwoCheckpoints
from weightgeom.estimators.reference_subspaces import Inputs, input_frames
from weightgeom.interfaces import Setting
from weightgeom.models.loading import load
from weightgeom.text.conversation import chats, pair_messages, text_messages
from weightgeom.text.examples import Pair

EXAMPLES = small.WORLD.examples()
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}<eos>{% endfor %}"
DIALOGUE = "\n\nHuman: Is 2 even?\n\nAssistant: Yes."
TURNS = [{"role": "user", "content": "Is 2 even?"}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize(
    "pair",
    [
        Pair("Is 2 even?", " Yes.", " No."),
        Pair(TURNS[:1], TURNS[1:], TURNS[1:]),
        Pair("\n\nHuman: Is 2 even?\n\nAssistant:", " Yes.", " No."),
    ],
)
def test_a_pair_of_strings_or_of_messages_is_the_same_conversation(pair):
    assert pair_messages(pair) == TURNS


def test_a_plain_dialogue_is_split_into_turns_and_other_text_is_a_user_message():
    assert text_messages(DIALOGUE) == TURNS
    assert text_messages("A Human: said") == [{"role": "user", "content": "A Human: said"}]


def test_the_models_own_template_writes_the_held_out_text():
    tokenizer = small.WORLD.tokenizer()
    tokenizer.chat_template = TEMPLATE
    pairs = replace(EXAMPLES, heldout_pairs=[Pair("Is 2 even?", " Yes.", " No.")])
    assert chats(pairs, tokenizer) == ["<user>Is 2 even?<eos><assistant>Yes.<eos>"]
    documents = replace(EXAMPLES, heldout_pairs=[], heldout=["words"])
    assert chats(documents, tokenizer) == ["<user>words<eos>"]


def test_a_missing_or_refusing_chat_template_is_an_error():
    tokenizer = small.WORLD.tokenizer()
    with pytest.raises(
        ValueError, match=r"has no chat template: set text=raw, or for model=pair use the tokenizer"
    ):
        chats(EXAMPLES, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match=r"refuses a conversation \(no system\): set text=raw"):
        chats(EXAMPLES, tokenizer)


def aligned_pair(home: Path) -> TwoCheckpoints:
    """Two checkpoints of which the second alone has a chat template."""
    before, after = save("llama", home / "before"), save("llama", home / "after", seed=1)
    tokenizer = small.WORLD.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(after)
    return TwoCheckpoints(str(before), str(after), tokenizer="after")


def test_the_activations_are_those_of_chats_by_the_tokenizer_of_the_aligned_model(tmp_path):
    pair = aligned_pair(tmp_path)
    pair.check(None)
    base = pair.prepare(no_stage, EXAMPLES, small.WORLD, "cpu")
    assert base.directory == tmp_path / "after"
    model = load(base.directory, "cpu")
    start = model.params(tmp_path / "before")
    setting = Setting(model, start, start, False, EXAMPLES, 0)
    written = replace(setting, examples=replace(EXAMPLES, heldout=chats(EXAMPLES, model.tokenizer)))
    moments, expected, raw = (
        [frame.moment.value for frame in input_frames(of_chats, start, 4, inputs) if frame.moment is not None]
        for of_chats, inputs in ((setting, Inputs(text="chat")), (written, Inputs()), (setting, Inputs()))
    )
    assert_close(moments, expected, rtol=0, atol=0)
    assert not any(moment.allclose(other) for moment, other in zip(moments, raw, strict=True))


def test_the_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    pair = aligned_pair(tmp_path)
    tied = save("llama_tied", tmp_path / "tied")
    with pytest.raises(
        ValueError, match=r"model\.tokenizer=after needs a whole model with the vocabulary of"
    ):
        replace(pair, before=str(tied), after=str(resized(tied, tmp_path / "other", by=2))).check(None)

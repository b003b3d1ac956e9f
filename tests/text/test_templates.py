import os
import signal
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from weightgeom.text import templates
from weightgeom.text.templates import rendered

HELLO = [{"role": "user", "content": "hello"}]


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>")), bos_token="<s>"
    )
    made.chat_template, made.name_or_path = template, "here"
    return made


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_conversations_are_rendered_in_order_as_by_the_tokenizer():
    made = tokenizer(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}\\n{% endfor %}{{ add_generation_prompt }}"
    )
    asked = [([{"role": "user", "content": f"\u2028 {n}"}], n % 2 == 0) for n in range(5)]
    theirs = [
        made.apply_chat_template(messages, tokenize=False, add_generation_prompt=header)
        for messages, header in asked
    ]
    before = children()
    assert rendered(asked, made) == theirs
    assert rendered([], made) == []
    assert children() == before


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('no system') }}", r"refuses a conversation \(no system\)"),
        ("{{ messages[7].content.x }}", r"refuses a conversation \(.*\)"),
        ("{% if %}", r"refuses a conversation \(.*\)"),
        ("{{ ().__class__.__base__.__subclasses__() }}", r"refuses a conversation \(.*unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "(refuses.*recursion|takes more than 0.3 s)"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "more than 0.3 s of",
        ),
        ("{{ 9 ** (9 ** 9) }}", "more than 0.3 s of processor time for one conversation"),
        ("{{ 'a' * 2000000000 }}", "takes more than 1 GiB of memory for one conversation"),
        ("{{ '%3000000000d' % 1 }}", "takes more than 1 GiB of memory for one conversation"),
        ("{{ 'a' * 3000000 }}", "writes 3000000 characters for one conversation, more than 1048676"),
    ],
)
def test_a_template_is_bounded_in_time_memory_and_output(template, problem, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.3)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match=f"the chat template of here .*{problem}"):
        rendered([(HELLO, True)], tokenizer(template))
    assert signal.getsignal(signal.SIGTERM) == handler

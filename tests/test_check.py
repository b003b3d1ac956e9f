import logging
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
from networks import save
from transformers import GraniteConfig

from weightgeom import check
from weightgeom.architectures import llama
from weightgeom.check import CHECKS, config_of, failure, logits_are_those_of_the_library, main
from weightgeom.check import moments_are_those_of_the_inputs as moments
from weightgeom.estimators.moments import Samples
from weightgeom.models.invariants import writes_reach_the_stream
from weightgeom.models.small_config import small_config
from weightgeom.models.specimen import Specimen


@pytest.mark.parametrize("name", ["opt", "directory"])
def test_a_right_map_passes_every_check_line_by_line(name, tmp_path, capsys):
    assert main([name if name == "opt" else str(save("qwen3_moe", tmp_path))]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS) and all(line.startswith("passed  ") for line in lines)
    assert last.startswith(f"{len(CHECKS)} of {len(CHECKS)} invariants hold for ")


def test_a_wrong_map_fails_with_the_sentence_and_the_exit_code_1(monkeypatch, capsys):
    wrong = ModuleType("weightgeom.architectures.olmo3")
    wrong.architecture = llama.architecture  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, wrong.__name__, wrong)
    assert main(["olmo3"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("failed  ")]
    assert len(failed) == 1 and failed[0].endswith(
        "L0.o adds to the residual stream other than the map says: a norm or a factor"
    )
    assert (
        lines[-1] == f"{len(CHECKS) - 1} of {len(CHECKS)} invariants hold for olmo3, in a network of 4 layers"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "bert",
            "error: no residual-stream map for 'bert': add a function architecture(config) in"
            " weightgeom/architectures/bert.py",
        ),
        ("./nowhere", "error: no directory ./nowhere: give a checkpoint directory or a hub name"),
    ],
)
def test_a_model_that_cannot_be_checked_is_refused_in_a_sentence_with_the_exit_code_2(name, message, capsys):
    assert main([name]) == 2
    assert capsys.readouterr().err.strip() == message


@pytest.mark.slow
def test_the_command_ends_in_the_exit_code():
    ended = subprocess.run(
        [sys.executable, "-m", "weightgeom.check", "bert"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2 and "add a function architecture(config) in" in ended.stderr


def test_of_a_type_key_value_groups_are_checked_where_there_can_be_some():
    assert config_of("llama").num_key_value_heads == 16  # by default as many as the 32 heads
    assert config_of("gemma2").num_key_value_heads == 4  # by default half of the 8


def test_settings_that_do_not_go_with_small_sizes_are_not_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(check, "CHECKS", ())
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        # The default positions of the type are those of a context of 8192 tokens and more.
        assert check.main(["apertus"]) == 0 and "rope" not in caplog.text
        with monkeypatch.context() as patch:
            patch.setattr("transformers.utils.logging.set_verbosity_error", lambda: None)
            assert check.main(["apertus"]) == 0 and "rope" in caplog.text
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)


def test_of_a_type_that_also_sees_the_text_part_is_checked():
    assert config_of("gemma3").model_type == "gemma3_text"


def granite(**multipliers: float) -> Specimen:
    """A network like Llama's but for constant factors, with Llama's map."""
    config = GraniteConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, vocab_size=50
    )
    for name, factor in multipliers.items():
        setattr(config, name, factor)
    return Specimen.of(config, llama.architecture(config))  # pyright: ignore[reportArgumentType]


def test_constant_factors_that_the_map_lacks_are_found_out(monkeypatch):
    assert failure(writes_reach_the_stream, granite()) is None
    sentence = failure(writes_reach_the_stream, granite(residual_multiplier=0.5))
    assert sentence == "L0.o adds to the residual stream other than the map says: a norm or a factor"
    assert failure(logits_are_those_of_the_library, granite(logits_scaling=2.0)) is None
    head: Any = granite(logits_scaling=2.0).network.get_output_embeddings()
    monkeypatch.setattr(check, "logits_of", lambda network, hidden: head(hidden))
    sentence = failure(logits_are_those_of_the_library, granite(logits_scaling=2.0))
    assert sentence is not None and "changes its logits behind the unembedding in a way that" in sentence


def test_inputs_that_the_hooks_cannot_take_are_found_out(monkeypatch):
    specimen = Specimen.of(small_config(config_of("opt")))
    assert failure(moments, specimen) is None
    monkeypatch.setattr(Samples, "by_sequence", lambda self, a: a)
    assert failure(moments, specimen) is not None

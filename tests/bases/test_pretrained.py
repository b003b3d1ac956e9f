import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import small
import torch
from app import WORLD, run
from networks import save
from safetensors.torch import load_file, save_file
from stored import OFFLINE, checkpoint, fetched, hub_cache, no_stage

from weightgeom.bases.hub import fetch, identity
from weightgeom.bases.pretrained import Pretrained, TwoCheckpoints, check_single
from weightgeom.data.text import TextFiles
from weightgeom.interventions.rank1 import Rank1
from weightgeom.interventions.surgery import DeltaSurgery
from weightgeom.probes.rsf import RSF
from weightgeom.probes.spectrum import Spectrum


@pytest.mark.slow
def test_offline_a_revision_resolves_through_the_caches_refs(tmp_path):
    repository = hub_cache(tmp_path, "lab/model", {"main": 0, "step3000": 1})
    first, third, missing, unknown = fetched(
        ["lab/model", "lab/model@step3000", "lab/model@step9", "lab/other"], tmp_path, OFFLINE
    )
    assert first == str(repository / "snapshots" / f"{0:040x}")
    assert third == str(repository / "snapshots" / f"{1:040x}")
    assert missing.startswith("refused: cannot get lab/model@step9 from the hub or its local cache (")
    assert missing.endswith(
        ": the cache has the revisions main, step3000; write lab/model@REVISION with one that exists"
    )
    assert unknown.startswith("refused: cannot get lab/other from the hub or its local cache (")


@pytest.mark.slow
def test_without_a_network_the_cache_serves_and_the_rest_is_refused_in_one_sentence(tmp_path):
    repository = hub_cache(tmp_path, "lab/model", {"main": 0})
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens on the discard port
    cached, unknown = fetched(["lab/model", "lab/other"], tmp_path, closed)
    assert cached == str(repository / "snapshots" / f"{0:040x}")
    assert unknown.startswith("refused: cannot get lab/other") and "\n" not in unknown


def test_a_directory_is_itself_and_other_paths_are_refused(tmp_path):
    assert fetch(str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match=r"no directory \./nowhere: give a checkpoint directory"):
        fetch("./nowhere")
    with pytest.raises(FileNotFoundError, match="'not a name!' is neither a directory nor a hub name"):
        fetch("not a name!")


def test_the_location_fills_in_the_size_and_the_revision(tmp_path):
    pythia = Pretrained(name="EleutherAI/pythia-{size}", size="1.4b", revision="step512")
    assert pythia.locations() == {0: "EleutherAI/pythia-1.4b@step512"}
    assert Pretrained(name=str(tmp_path), revision="step512").locations() == {0: str(tmp_path)}


def test_a_checkpoint_to_train_from_is_fetched_and_known_by_its_files(tmp_path):
    directory = checkpoint(tmp_path / "base")
    model = Pretrained(name=str(directory))
    assert model.check(longest=128).d_model == 32
    examples = small.WORLD.examples()
    base = model.prepare(no_stage, examples, small.WORLD, "cpu")
    assert base.directory == directory and base.trajectory is None and base.identity == identity(directory)
    checkpoint(directory, seed=1)
    assert identity(directory) != base.identity


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "merges.txt",
        "vocab.txt",
        "vocab.json",
        "tokenizer.model",
        "qwen.tiktoken",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
        "modeling_own.py",
    ],
)
def test_every_file_that_a_result_may_depend_on_is_in_the_identity(tmp_path, name):
    directory = checkpoint(tmp_path / "base")
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text("{}")
    before = identity(directory)
    (directory / name).write_text("[]")
    assert identity(directory) != before


def test_the_identity_is_of_the_contents_whatever_size_and_time_say(tmp_path):
    directory = checkpoint(tmp_path / "base")
    before, path = identity(directory), directory / "model.safetensors"
    shutil.copytree(directory, tmp_path / "copy")
    assert identity(tmp_path / "copy") == before
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity(directory) != before
    (tmp_path / "copy" / "README.md").write_text("about it")
    (tmp_path / "copy" / "training_args.bin").write_bytes(b"x")
    assert identity(tmp_path / "copy") == before


def test_shards_in_a_folder_are_in_the_identity(tmp_path):
    directory = checkpoint(tmp_path / "base")
    (directory / "shards").mkdir()
    shard = (directory / "model.safetensors").rename(directory / "shards" / "model.safetensors")
    names = dict.fromkeys(load_file(shard), "shards/model.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    before, content = identity(directory), bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert identity(directory) != before
    index.write_text(json.dumps({"weight_map": {"a": "/etc/passwd", "b": "../model.safetensors"}}))
    identity(directory)  # files outside are refused where the weights are read


def test_two_checkpoints_are_a_trajectory_of_one_step(tmp_path):
    pair = TwoCheckpoints(str(checkpoint(tmp_path / "a")), str(checkpoint(tmp_path / "b", seed=1)))
    assert pair.check(longest=None).n_layers == 2
    base = pair.prepare(no_stage, small.WORLD.examples(), small.WORLD, "cpu")
    assert base.trajectory is not None and not base.trajectory.from_random
    assert base.trajectory.steps == {0: tmp_path / "a", 1: tmp_path / "b"}


@pytest.mark.parametrize(
    "part", ["embed_in.weight", "layers.1.attention.dense.bias", "final_layer_norm.weight"]
)
def test_values_that_are_not_finite_are_refused_where_no_update_is_measured(tmp_path, part):
    good, bad = (checkpoint(tmp_path / name) for name in "ab")
    weights = load_file(bad / "model.safetensors")
    weights[f"gpt_neox.{part}"][3] = torch.nan
    save_file(weights, bad / "model.safetensors", {"format": "pt"})
    for before, after in ((good, bad), (bad, good)):
        pair = TwoCheckpoints(str(before), str(after))
        with pytest.raises(ValueError, match=rf"{part} of {bad} has values that are not finite: the checkpo"):
            pair.prepare(no_stage, small.WORLD.examples(), small.WORLD, "cpu")
    with pytest.raises(ValueError, match="has values that are not finite"):
        Pretrained(name=str(bad)).prepare(no_stage, small.WORLD.examples(), small.WORLD, "cpu")


def test_checkpoints_with_nothing_to_measure_or_train_are_refused(tmp_path):
    directory = str(checkpoint(tmp_path / "a"))
    probes = {"spectrum": Spectrum().declaration, "rsf": RSF().declaration}
    nothing = "objective=none on a single checkpoint leaves no update to measure:"
    with pytest.raises(ValueError, match=rf"{nothing} probe\.rsf is about it: choose an objective"):
        check_single(probes, {"rank1": Rank1()})
    with pytest.raises(ValueError, match=rf"{nothing} intervention\.surgery is about it"):
        check_single({}, {"rank1": Rank1(), "surgery": DeltaSurgery()})
    with pytest.raises(ValueError, match=rf"{nothing} choose an objective"):
        check_single({}, {})
    check_single({"spectrum": Spectrum().declaration}, {"rank1": Rank1()})
    with pytest.raises(ValueError, match=r"model=pair compares two finished checkpoints: set objective=none"):
        TwoCheckpoints(directory, directory).check(longest=8)
    with pytest.raises(ValueError, match="max_length is 129 tokens and the model takes 128"):
        Pretrained(name=directory).check(longest=129)


def adapter(directory: Path, module: str, d_in: int = 32, d_out: int = 96) -> Path:
    """A LoRA adapter of rank 2 of one module of `checkpoint`'s."""
    directory.mkdir()
    name = f"base_model.model.gpt_neox.layers.0.{module}"
    factors = {f"{name}.lora_A.weight": torch.ones(2, d_in), f"{name}.lora_B.weight": torch.ones(d_out, 2)}
    save_file(factors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    return directory


def test_an_adapter_is_compared_with_its_base(tmp_path):
    base = checkpoint(tmp_path / "base")
    after = adapter(tmp_path / "adapter", "attention.query_key_value")
    pair = TwoCheckpoints(str(base), str(after))
    assert pair.check(longest=None).d_model == 32
    prepared = pair.prepare(no_stage, small.WORLD.examples(), small.WORLD, "cpu")
    assert prepared.trajectory is not None and prepared.trajectory.steps == {0: base, 1: after}


def test_an_adapter_that_does_not_fit_its_base_or_stands_before_it_is_refused(tmp_path):
    base = str(checkpoint(tmp_path / "base"))
    wide = str(adapter(tmp_path / "wide", "attention.query_key_value", d_in=64))
    foreign = str(adapter(tmp_path / "foreign", "self_attn.q_proj"))
    with pytest.raises(ValueError, match=r"this adapter belongs to another base model"):
        TwoCheckpoints(base, wide).check(longest=None)
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.lora_A\.weight, which is no LoRA factor"):
        TwoCheckpoints(base, foreign).check(longest=None)
    with pytest.raises(
        ValueError, match=r"model\.before=.*wide is an adapter: set model\.before to its base model"
    ):
        TwoCheckpoints(wide, base).check(longest=None)


@pytest.mark.slow
def test_revisions_are_a_trajectory_in_the_order_of_their_list(tmp_path):
    hub_cache(tmp_path, "lab/model", {"step0": 0, "step512": 1, "step64": 2})
    program = """
from weightgeom.bases.pretrained import Pretrained
model = Pretrained("lab/model", revisions=["step512", "step0", "step64"])
model.check(None)
base = model.prepare(None, None, None, "cpu")
steps = base.trajectory.steps
print(list(steps), base.trajectory.from_random, base.directory == steps[2], len(set(steps.values())))
"""
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[0, 1, 2] False True 3"


def test_the_checkpoints_that_a_trainer_left_are_a_trajectory(tmp_path):
    for seed, step in enumerate((100, 20, 3)):
        checkpoint(tmp_path / f"checkpoint-{step}", seed)
    model = Pretrained(str(tmp_path))
    assert model.check(None) == model.check(16)
    base = model.prepare(no_stage, small.WORLD.examples(), small.WORLD, "cpu")
    assert base.trajectory is not None and not base.trajectory.from_random
    assert [path.name for path in base.trajectory.steps.values()] == [
        "checkpoint-3",
        "checkpoint-20",
        "checkpoint-100",
    ]
    assert base.directory.name == "checkpoint-100"
    other = Pretrained(str(tmp_path), from_random=True).prepare(
        no_stage, small.WORLD.examples(), small.WORLD, "cpu"
    )
    assert other.trajectory is not None and other.trajectory.from_random


@pytest.mark.parametrize(
    ("revisions", "steps"),
    [
        (["step0", "step512", "step1000"], [0, 512, 1000]),
        (["step512", "step1000"], [512, 1000]),
        (["stage1-step10-tokens1B", "stage1-step2000-tokens9B"], [10, 2000]),
        (["stage1-step1413814", "stage2-step1000"], [0, 1]),
        (["stage1-step1000", "stage2-step2000"], [0, 1]),
        (["step512", "step64"], [0, 1]),
        (["warm", "cooled", "final"], [0, 1, 2]),
    ],
)
def test_revisions_keep_their_order_and_the_steps_in_their_names_where_these_rise(revisions, steps):
    locations = Pretrained("org/model", revisions=revisions).locations()
    assert locations == {step: f"org/model@{name}" for step, name in zip(steps, revisions, strict=True)}


@pytest.mark.parametrize(
    ("revisions", "message"),
    [
        (["step1"], "must be two or more different names"),
        (["step1", "step1"], "must be two or more different names"),
        ([], "must be two or more different names"),
        (["main", "step2"], "main is a moving branch"),
    ],
)
def test_revisions_that_make_no_trajectory_are_refused(revisions, message):
    with pytest.raises(ValueError, match=message):
        Pretrained("org/model", revisions=revisions)


def test_adapters_that_a_trainer_left_are_refused_with_the_command_that_measures_one(tmp_path):
    for step in (9, 10):
        directory = adapter(tmp_path / f"checkpoint-{step}", "attention.query_key_value")
        config = '{"peft_type": "LORA", "base_model_name_or_path": "lab/base"}'
        (directory / "adapter_config.json").write_text(config)
    last = tmp_path / "checkpoint-10"
    command = f"objective=none model=pair model.before=lab/base model.after={last}"
    for name in (tmp_path, last):
        with pytest.raises(
            ValueError, match=f"{last} is an adapter without weights of its own: .* {command}"
        ):
            Pretrained(str(name)).check(None if name == tmp_path else 16)


def test_an_adapter_in_a_folder_of_the_directory_is_named(tmp_path):
    base, inside = checkpoint(tmp_path / "base"), tmp_path / "after" / "style"
    inside.parent.mkdir()
    adapter(inside, "attention.query_key_value")
    with pytest.raises(FileNotFoundError, match=f"give one of its folders, such as {inside}"):
        TwoCheckpoints(str(base), str(inside.parent)).check(None)


def test_a_name_of_the_hub_needs_a_revision_that_does_not_move(tmp_path):
    pins = {"lab/model-1b": "c" * 40}
    assert Pretrained("lab/model-{size}{stage}", size="1b", pins=pins).locations() == {
        0: f"lab/model-1b@{'c' * 40}"
    }
    assert Pretrained("lab/model-1b", revision="v1", pins=pins).locations() == {0: "lab/model-1b@v1"}
    with pytest.raises(ValueError, match=r"lab/model-1b-sft is not pinned: set model\.revision=COMMIT to a"):
        Pretrained("lab/model-{size}{stage}", size="1b", stage="-sft", pins=pins).locations()
    moving_ones: list[dict[str, Any]] = [{"revision": "main"}, {"pins": {"lab/model": "master"}}]
    for moving in moving_ones:
        with pytest.raises(ValueError, match=r"model\.revision=\w+ is a moving branch: set model"):
            Pretrained("lab/model", **moving)
    with pytest.raises(FileNotFoundError, match=r"no directory \./nowhere"):
        Pretrained("./nowhere").check(8)


def test_a_hub_name_without_a_revision_is_logged_with_its_current_commit(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *given, **named: str(tmp_path / "abc"))
    with caplog.at_level(logging.WARNING):
        fetch("lab/model@v1")
        assert not caplog.text
        fetch("lab/model")
    assert "lab/model is not pinned: write lab/model@abc" in caplog.text


def test_the_generated_world_under_a_model_of_another_vocabulary_is_a_warning(tmp_path, caplog):
    known, foreign = save("llama", tmp_path / "known"), save("llama", tmp_path / "foreign", seed=1)
    small.WORLD.tokenizer().save_pretrained(known)
    replace(small.WORLD, seed=9).tokenizer().save_pretrained(foreign)
    examples = small.WORLD.examples()
    Pretrained(str(known)).prepare(no_stage, examples, small.WORLD, "cpu")
    Pretrained(str(foreign)).prepare(no_stage, examples, TextFiles("my.txt"), "cpu")
    assert "data=world" not in caplog.text
    warning = f"data=world is the generated language of model=tiny, not text of {foreign}"
    for model in (Pretrained(str(foreign)), TwoCheckpoints(str(foreign), str(known))):
        caplog.clear()
        model.prepare(no_stage, examples, small.WORLD, "cpu")
        assert caplog.text.count(warning) == 1


@pytest.mark.slow
def test_a_single_checkpoint_is_measured_where_no_update_is_needed(tmp_path):
    checkpoint(tmp_path / "a")
    measured = (
        *("probe=[spectrum,behaviour]", "probe.spectrum.tokens=256", "probe.behaviour.tokens=256"),
        *("intervention=[rank1]", "intervention.rank1.strengths=[0.3]", "intervention.rank1.tokens=256"),
        *("intervention.rank1.layers=[1]", "objective=none", "model=pythia", "model.name=a", "device=cpu"),
    )
    ended = run(tmp_path, *WORLD, *measured)
    assert ended.code == 0, ended.err
    assert "The checkpoint (behaviour)" in ended.out and re.search(r"answer: heldout_ce \d", ended.out)
    tables = {name: pd.read_parquet(ended.record / f"artifacts/tables/{name}.parquet") for name in (
        "spectrum", "behaviour", "rank1",
    )}  # fmt: skip
    assert all(set(table["step"]) == {0} and len(table) for table in tables.values())
    assert not tables["spectrum"]["quantity"].str.startswith("delta").any()
    refused = run(tmp_path, *WORLD, "objective=none", "model=pythia", "model.name=a", "device=cpu")
    assert refused.code == 1 and "probe.rsf is about it" in refused.errors[0]

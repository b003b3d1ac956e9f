import json
from pathlib import Path

import app
import pandas as pd
import pytest
from llamas import TEXTS, TOKENIZER, llama, saved

import weightgeom as wg
from weightgeom.probes.behaviour import Behaviour
from weightgeom.probes.overlap import Overlap
from weightgeom.probes.rsf import RSF
from weightgeom.probes.spectrum import Spectrum

PROBES = {
    "rsf": RSF(k=[4, 8], tokens=512),
    "behaviour": Behaviour(tokens=512),
    "spectrum": Spectrum(tokens=512),
    "overlap": Overlap(k=4, tokens=512),
}
BEFORE, AFTER = llama(0), llama(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints and their text."""
    place = tmp_path_factory.mktemp("pair")
    saved(BEFORE, place / "before")
    saved(AFTER, place / "after")
    for name, texts in (("heldout", TEXTS), ("train", ["another document"])):
        lines = [json.dumps({"text": text}) for text in texts]
        (place / f"{name}.jsonl").write_text("\n".join(lines))
    return place


@pytest.fixture(scope="module")
def pair(place: Path) -> wg.Run:
    """Their comparison by the command line."""
    ended = app.run(
        place,
        *"objective=none model=pair model.before=before model.after=after device=cpu".split(),
        *"data=text data.train=train.jsonl data.heldout=heldout.jsonl seed=3".split(),
        *f"probe=[{','.join(PROBES)}] probe.rsf.k=[4,8] probe.overlap.k=4".split(),
        *(f"probe.{name}.tokens=512" for name in PROBES),
    )
    assert ended.code == 0, ended.err
    return wg.read_run(ended.record)


@pytest.mark.parametrize("form", ["directories", "names", "networks", "state dicts", "arrays"])
def test_python_and_the_command_line_give_the_same_numbers_to_the_bit(
    place: Path, pair: wg.Run, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    networks = (BEFORE, AFTER)
    before, after = {
        "directories": (place / "before", place / "after"),
        "names": ("before", "after"),
        "networks": networks,
        "state dicts": [network.state_dict() for network in networks],
        "arrays": [
            {name: weight.numpy() for name, weight in network.state_dict().items()} for network in networks
        ],
    }[form]
    in_memory = form in ("networks", "state dicts", "arrays")
    config = None if form in ("directories", "names", "networks") else BEFORE.config
    tokenizer = TOKENIZER if in_memory else None
    table = wg.measure(
        before,
        after,
        texts=TEXTS,
        tokenizer=tokenizer,
        probes=list(PROBES.values()),
        config=config,
        seed=3,
        device="cpu",
    )
    expected = pd.concat([pair.tables[name] for name in PROBES])
    expected = expected.query("step == 1").reset_index(drop=True)
    assert set(expected["quantity"]) >= {"ratio", "heldout_ce", "delta_effective_rank", "rotation"}
    pd.testing.assert_frame_equal(table, expected, check_exact=True)


def test_the_run_is_read_back_with_its_configuration_and_its_figures(pair: wg.Run) -> None:
    assert pair.status == "FINISHED" and pair.config["probe"]["rsf"]["k"] == [4, 8]
    assert pair.tables.keys() == PROBES.keys()
    assert pair.figure("ratio_by_layer")._repr_png_().startswith(b"\x89PNG")


SCRIPT = """
import weightgeom as wg
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

bytes_of_text = Tokenizer(models.BPE({a: i for i, a in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
bytes_of_text.pre_tokenizer = pre_tokenizers.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_of_text, eos_token="!")
config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
before, after = LlamaForCausalLM(config), LlamaForCausalLM(config)
before.save_pretrained("before"), tokenizer.save_pretrained("before"), after.save_pretrained("after")
texts = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs."]
table = wg.measure("before", "after", texts=texts, k=16)
ratios = table[(table["quantity"] == "ratio") & (table["subspace"] != "random")]
print(ratios.pivot_table("value", "layer", "matrix").round(2))
"""


def test_a_short_script_prints_a_ratio_of_about_one_for_two_random_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    exec(SCRIPT, space)
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["matrix", "down", "gate", "k", "o", "q", "up", "v"] and len(rows) == 2
    # The null's sd of a ratio at d = 64, k = 16 and full rank is below 0.05; the bound is six of those.
    assert all(abs(float(value) - 1) < 0.3 for row in rows for value in row.split()[1:])
    same = wg.measure(
        space["before"], space["after"], texts=space["texts"], tokenizer=space["tokenizer"], k=16
    )
    pd.testing.assert_frame_equal(same, space["table"], check_exact=True)

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from llamas import FEW, TEXTS, TOKENIZER, llama, saved
from small import WORLD
from torch import nn
from transformers import AutoModel, LlamaForCausalLM
from unchecked import unchecked

import weightgeom as wg
from weightgeom import library
from weightgeom.probes.behaviour import Behaviour
from weightgeom.probes.overlap import Overlap
from weightgeom.probes.rsf import RSF
from weightgeom.probes.sparsity import Sparsity

QUICK = RSF(k=4, tokens=FEW, resamples=0)
BEFORE, AFTER = llama(0), llama(1)
as_users_have_it = unchecked(library)


def measured(before: Any = BEFORE, after: Any = AFTER, **changes: Any) -> pd.DataFrame:
    asked: dict[str, Any] = {"texts": TEXTS, "tokenizer": TOKENIZER, "probes": [QUICK], "device": "cpu"}
    return as_users_have_it.measure(before, after, **(asked | changes))


def equal(table: pd.DataFrame, other_table: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(table, other_table, check_exact=True)


def test_names_classes_and_configured_probes_give_the_same_rows():
    named = measured(probes=["rsf", "behaviour"], k=4)
    equal(named, measured(probes=[RSF, Behaviour], k=[4]))
    equal(named, measured(probes=[RSF(k=4), Behaviour()]))
    assert set(named["step"]) == {1} and set(named["unit"]) == {"1", "nats/token"}


def test_functions_of_two_matrices_and_probes_of_pairs_share_a_walk_and_keep_their_order():
    chosen = [Overlap(tokens=FEW, k=4), Sparsity(rank=4), "sparsity"]
    table = measured(probes=chosen)
    parts = [measured(probes=[probe]) for probe in chosen]
    equal(table, pd.concat(parts, ignore_index=True).reindex(columns=table.columns))


def test_a_network_in_train_mode_is_measured_without_dropout_and_left_as_it_was():
    training = llama(1, attention_dropout=0.5).train()
    weights = {name: weight.clone() for name, weight in training.state_dict().items()}
    frozen = training.lm_head.weight.requires_grad_(False)
    random = torch.random.get_rng_state()
    table = measured(after=training, probes=[QUICK, Behaviour(tokens=FEW)])
    equal(table, measured(probes=[QUICK, Behaviour(tokens=FEW)]))
    with pytest.raises(ValueError, match="k must be 1 to 32"):
        measured(after=training, probes=["rsf"], k=33)
    assert all(module.training for module in training.modules())
    assert [parameter for parameter in training.parameters() if not parameter.requires_grad] == [frozen]
    assert all(
        parameter.grad is None and parameter.dtype == torch.float32 for parameter in training.parameters()
    )
    assert all(torch.equal(weight, weights[name]) for name, weight in training.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())


def test_weights_in_half_precision_are_measured_as_their_checkpoint_on_disk(tmp_path: Path):
    halves = [copy.deepcopy(network).bfloat16() for network in (BEFORE, AFTER)]
    places = [saved(network, tmp_path / name) for network, name in zip(halves, "ab", strict=True)]
    table = measured(*halves)
    equal(table, measured(*places))
    assert "rounding_share" in set(table["quantity"]) and halves[0].dtype == torch.bfloat16


def test_another_attention_kernel_of_the_network_changes_no_number():
    eager = copy.deepcopy(BEFORE)
    eager.set_attn_implementation("eager")
    equal(measured(eager), measured())
    equal(measured(eager.state_dict(), AFTER.state_dict(), config=eager.config), measured())


def test_prefixes_that_wrappers_leave_are_passed_over():
    state = AFTER.state_dict()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        equal(measured(after={prefix + name: weight for name, weight in state.items()}), measured())
    inside = {name.replace("model.layers.0.", "model.layers.0._orig_mod."): w for name, w in state.items()}
    equal(measured(after=inside), measured())


def test_the_config_of_a_state_dict_is_given_or_that_of_the_other_checkpoint():
    states = BEFORE.state_dict(), AFTER.state_dict()
    for before, after, config in (
        (states[0], AFTER, None),
        (BEFORE, states[1], None),
        (*states, BEFORE.config),
    ):
        equal(measured(before, after, config=config), measured())
    with pytest.raises(ValueError, match=r"a state dict says nothing of its network: add config="):
        measured(*states)
    with pytest.raises(ValueError, match=r"embed_tokens.weight of before is of shape \(\d+, 32\), and its"):
        measured(*states, config=llama(0, hidden_size=64).config)
    with pytest.raises(TypeError, match=r"config must be a transformers config, .*, got str"):
        measured(*states, config="llama")


def test_arrays_that_cannot_be_written_are_measured_all_the_same():
    arrays = {name: weight.numpy() for name, weight in AFTER.state_dict().items()}
    fixed = {name: array.copy() for name, array in arrays.items()}
    for array in fixed.values():
        array.flags.writeable = False
    equal(measured(after=fixed), measured(after={n: array[::-1][::-1] for n, array in arrays.items()}))


def test_the_tokenizer_is_that_of_a_directory_or_must_be_given(tmp_path: Path):
    equal(measured(saved(BEFORE, tmp_path / "before"), tokenizer=None), measured())
    equal(measured(after=saved(AFTER, tmp_path / "after"), tokenizer=None), measured())
    with pytest.raises(ValueError, match="weights in memory have no tokenizer: add tokenizer=AutoTokenizer"):
        measured(tokenizer=None)
    with pytest.raises(TypeError, match=r"tokenizer must be a transformers tokenizer, .*, got str"):
        measured(tokenizer="gpt2")


def test_a_tokenizer_of_another_model_is_refused():
    larger = WORLD.tokenizer()
    larger.add_tokens(["new"])
    tokens = len(TOKENIZER)
    with pytest.raises(ValueError, match=f"has {tokens + 1} tokens and the model {tokens} embeddings: give"):
        measured(tokenizer=larger)
    endless = WORLD.tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no end token, which closes a document"):
        measured(tokenizer=endless)


@pytest.mark.parametrize(
    ("texts", "kind", "sentence"),
    [
        (TEXTS[0], TypeError, r"must be a list of documents, got one string: write texts=\[text\]"),
        ([1, 2], TypeError, "must be a list of strings, got int in it: give the documents alone"),
        ([{"text": TEXTS[0]}], TypeError, "must be a list of strings, got dict in it"),
        ({"text": TEXTS[0]}, TypeError, "must be a list of documents, got dict"),
        (None, TypeError, "must be a list of documents, got NoneType"),
        ([], ValueError, "texts is empty: give documents of the kind that the model reads"),
        (["", " \n"], ValueError, "texts is empty"),
        (["the of"], ValueError, "texts have 2 tokens, too few to say anything of a model: give 16 or more"),
    ],
)
def test_texts_that_are_no_documents_are_refused(texts: object, kind: type[Exception], sentence: str):
    with pytest.raises(kind, match=sentence):
        measured(texts=texts)


def test_fewer_tokens_than_directions_are_refused():
    words = " ".join(TEXTS).split()[:20]
    for probes, k in ((["rsf"], 32), ([RSF(k=32)], None)):
        with pytest.raises(ValueError, match=r"have \d+ tokens, whose inputs cannot span k=32 directions"):
            measured(texts=[" ".join(words)], probes=probes, k=k)
    with pytest.raises(ValueError, match=r"have 24 tokens, whose inputs cannot span k=32 directions"):
        measured(probes=[RSF(k=[4, 32], tokens=24)])


@pytest.mark.parametrize("k", [0, 33, [4, 33], []])
def test_a_k_that_does_not_fit_is_refused(k: object):
    with pytest.raises(ValueError, match=r"k must be 1 to 32, the width of the residual stream, got"):
        measured(probes=["rsf"], k=k)


def test_a_k_that_no_probe_takes_is_refused():
    with pytest.raises(ValueError, match=r"no probe takes k=4: leave it out, or set it in the configured"):
        measured(probes=[QUICK, "behaviour"], k=4)
    with pytest.raises(ValueError, match=r"the probe overlap does not take k=\[4, 8\]: input should be a va"):
        measured(probes=["overlap"], k=[4, 8])
    with pytest.raises(ValueError, match=r"k of the probe RSF must be 1 to 32"):
        measured(probes=[RSF(k=64)])


def test_probes_that_are_none_or_need_more_than_texts_are_refused():
    with pytest.raises(KeyError, match=r"unknown probe 'rfs'; choose from alignment, behaviour, .*rsf"):
        measured(probes=["rfs"])
    with pytest.raises(TypeError, match=r"probes must be a list, got one string: write probes=\['rsf'\]"):
        measured(probes="rsf")
    with pytest.raises(ValueError, match="probes is empty: give some"):
        measured(probes=[])
    for wrong in (3, dict):
        with pytest.raises(TypeError, match=r"a probe is a name, a class or a configured object such as RSF"):
            measured(probes=[wrong])
    with pytest.raises(ValueError, match="the probe moments has no rows for two checkpoints alone: it needs"):
        measured(probes=["moments"])
    with pytest.raises(
        ValueError, match=r"the probe uncertainty needs more than texts \(texts has no prompt groups"
    ):
        measured(probes=["uncertainty"])


def test_two_checkpoints_of_different_shapes_are_refused():
    deeper = llama(1, layers=3)
    with pytest.raises(ValueError, match=r"model.layers.2.* and 8 more parameters differ: take two checkpo"):
        measured(after=deeper)
    with pytest.raises(ValueError, match=r"is of shape \(\d+, 64\) after and of shape \(\d+, 32\) before"):
        measured(after=llama(1, hidden_size=64))


def test_the_same_tensors_before_and_after_are_refused():
    network = copy.deepcopy(BEFORE)
    for before in (network, network.state_dict()):
        with pytest.raises(ValueError, match=r"before and after are the same tensors, .*: keep a copy from"):
            measured(before, network)


def test_networks_that_are_wrapped_headless_or_none_are_refused():
    with pytest.raises(
        TypeError, match="before is a LlamaModel, which has no language-model head: load it w"
    ):
        measured(AutoModel.from_config(BEFORE.config))
    with pytest.raises(TypeError, match=r"after is a DataParallel, which wraps a network: .* model\.module"):
        measured(after=nn.DataParallel(AFTER))
    with pytest.raises(
        TypeError, match=r"after must be a directory, a hub name, .* or a state dict, got int"
    ):
        measured(after=3)
    with torch.device("meta"):
        empty = LlamaForCausalLM(BEFORE.config)
    with pytest.raises(ValueError, match=r"of after is on the meta device, without data: load the network"):
        measured(after=empty)


def test_state_dicts_that_are_incomplete_or_quantised_are_refused():
    state = AFTER.state_dict()
    headless = {name: weight for name, weight in state.items() if name != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"before lacks 1 of the network's parameters, the first lm_head.we"):
        measured(headless)
    with pytest.raises(ValueError, match=r"lm_head.weight is absent after and of shape"):
        measured(after=headless)
    for dtype in (torch.int8, torch.int64):
        with pytest.raises(ValueError, match=rf"after is quantised \(lm_head.weight is of dtype {dtype}\)"):
            measured(after=state | {"lm_head.weight": state["lm_head.weight"].to(dtype)})
    with pytest.raises(
        TypeError, match=r"model of after is a dict: a state dict holds tensors or NumPy arra"
    ):
        measured(after={"model": {}, "step": 3})


def test_directories_that_are_none_and_adapters_before_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"after: there is no directory .*nowhere"):
        measured(after=tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"before=.* is an adapter: give its base model there instead"):
        measured(tmp_path)
    with pytest.raises(ValueError, match=r"network=.* is an adapter: merge it into its base model"):
        wg.subspaces(tmp_path, TOKENIZER, TEXTS)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    equal(measured(device="auto"), measured(device=torch.device("cpu")))
    with pytest.raises(ValueError, match="device='cuda', and torch sees no GPU here: use device='cpu'"):
        measured(device="cuda")
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu' or 'cuda', got 'gpu'"):
        measured(device="gpu")


def test_the_rotation_test_in_the_subspaces_of_a_network_gives_the_tables_numbers():
    table = wg.measure(BEFORE, AFTER, texts=TEXTS, tokenizer=TOKENIZER, probes=["rsf"], k=4, device="cpu")
    spaces = wg.subspaces(BEFORE, TOKENIZER, TEXTS, k=4, device="cpu")
    places = [(name, layer) for layer in (0, 1) for name in ("attention_input", "mlp_input")]
    assert list(spaces) == [*places, ("prediction", None)]
    compared: list[tuple[Any, str, str, Literal["read", "write"]]] = [
        (("attention_input", 1), "q", "self_attn.q_proj", "read"),
        (("mlp_input", 1), "up", "mlp.up_proj", "read"),
        (("prediction", None), "down", "mlp.down_proj", "write"),
    ]
    for place, matrix, module, side in compared:
        weights = [network.get_parameter(f"model.layers.1.{module}.weight") for network in (BEFORE, AFTER)]
        test = wg.rotation_test(weights[1] - weights[0], spaces[place], side=side)
        rows = table[(table["layer"] == 1) & (table["matrix"] == matrix) & (table["subspace"] == place[0])]
        value_of = rows.set_index("quantity")["value"]
        # The table's second moments are summed by group of prompts: that leaves fp32's rounding, 6e-8, of
        # the sums, which gaps between the eigenvalues of a random network's inputs enlarge.
        assert test.ratio == pytest.approx(value_of["ratio"], rel=1e-4)
        assert (test.null_mean * 8, test.null_sd * 8) == (
            value_of["null_ratio_mean"],
            value_of["null_ratio_sd"],
        )
        assert test.z == pytest.approx(value_of["z"], rel=1e-2)
        assert test.p_value == pytest.approx(value_of["p_value"], abs=2e-3)


def test_subspaces_are_orthonormal_and_refuse_what_measure_does():
    spaces = wg.subspaces(BEFORE, TOKENIZER, TEXTS, device="cpu")
    for space in spaces.values():
        assert space.basis.shape == (32, 4) and space.basis.dtype == torch.float64
        torch.testing.assert_close(space.basis.T @ space.basis, torch.eye(4).double())
    state = {name: weight.numpy() for name, weight in BEFORE.state_dict().items()}
    assert isinstance(state["lm_head.weight"], np.ndarray)
    again = wg.subspaces(state, TOKENIZER, TEXTS, config=BEFORE.config, device="cpu")
    assert all(torch.equal(space.basis, again[place].basis) for place, space in spaces.items())
    with pytest.raises(ValueError, match="k must be 1 to 32, the width of the residual stream, got 40"):
        wg.subspaces(BEFORE, TOKENIZER, TEXTS, k=40)
    with pytest.raises(ValueError, match=r"have \d+ tokens, whose inputs cannot span k=32 directions"):
        wg.subspaces(BEFORE, TOKENIZER, [" ".join(TEXTS[0].split()[:20])], k=32)

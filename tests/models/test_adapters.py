import json
from math import sqrt
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
)

from weightgeom.estimators.updates import head_updates, update_of
from weightgeom.models.adapters import (
    Adapted,
    LowRank,
    is_adapter,
    open_adapter,
    open_checkpoint,
    warn_of_other_base,
)
from weightgeom.models.residual import architecture_of
from weightgeom.models.weights import open_params

SIZES: dict[str, Any] = dict(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
)
GPT2: dict[str, Any] = dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_inner=40, n_positions=16)
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=2),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "gpt2": lambda: GPT2Config(**GPT2),
    "olmo2": lambda: Olmo2Config(**SIZES, pad_token_id=2),
    "granite": lambda: GraniteConfig(**SIZES, residual_multiplier=0.25),
}
Q = "model.layers.0.self_attn.q_proj"


class Case:
    """A small random base with a LoRA adapter of rank 3 on every residual matrix, saved as PEFT saves it."""

    def __init__(self, name, directory):
        config = CONFIGS[name]()
        generator = torch.Generator().manual_seed(0)
        shapes = {n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
        self.map = architecture_of(config)
        self.base = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        self.directory = directory
        modules = {m.module: m.transposed for m in self.map.matrices}
        self.tensors = {}
        for module, transposed in modules.items():
            stored = self.base[f"{module}.weight"]
            d_out, d_in = (stored.T if transposed else stored).shape
            self[module, "A"] = torch.randn(3, d_in, generator=generator)
            self[module, "B"] = torch.randn(d_out, 3, generator=generator)
        self.config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none"}
        self.transposed = modules

    def __setitem__(self, key, value):
        self.tensors[f"base_model.model.{key[0]}.lora_{key[1]}.weight"] = value

    def __getitem__(self, key):
        return self.tensors[f"base_model.model.{key[0]}.lora_{key[1]}.weight"]

    def save(self, **options):
        (self.directory / "adapter_config.json").write_text(json.dumps(self.config | options))
        save_file(self.tensors, self.directory / "adapter_model.safetensors")
        return self.directory

    def open(self, **options):
        return open_adapter(self.save(**options), self.map, self.base)

    def merged(self, module, scale):
        product = scale * self[module, "B"] @ self[module, "A"]
        return self.base[f"{module}.weight"] + (product.T if self.transposed[module] else product)


@pytest.fixture(params=CONFIGS)
def case(request, tmp_path):
    return Case(request.param, tmp_path)


@pytest.fixture
def llama(tmp_path):
    return Case("llama", tmp_path)


def test_an_adapted_weight_is_the_base_plus_the_scaled_product(case):
    adapted = case.open()
    assert set(adapted) == set(case.base) and len(adapted) == len(case.base)
    for module in case.transposed:
        assert_close(adapted[f"{module}.weight"], case.merged(module, 2), rtol=1e-6, atol=1e-5)
    untouched = case.map.embed
    assert adapted[untouched] is case.base[untouched] and "absent" not in adapted


@pytest.mark.parametrize("written", [True, False])
def test_the_gram_matrix_from_the_factors_is_that_of_the_multiplied_out_update(case, written):
    adapted = case.open()
    dense = {name: tensor.double() for name, tensor in adapted.items()}
    for matrix in case.map.matrices:
        take = matrix.written if written else matrix.of
        delta = take(dense) - take(case.base).double()
        x = delta if matrix.role == "read" else delta.T
        expected = x.T @ x
        update = update_of(matrix, adapted, case.base, written=written)
        # The multiplied-out weights are rounded to fp32, at 6e-8 of weights that dW exceeds sixfold.
        assert (update.gram - expected).norm() < 1e-6 * expected.norm()
        assert update.shape == delta.shape and update.moved_share == 1


def test_the_heads_of_an_adapters_update_are_those_of_the_multiplied_out_one(case):
    adapted = case.open()
    dense = dict(adapted)
    for matrix in (m for m in case.map.matrices if m.kind in ("q", "k", "v", "o")):
        pairs = zip(
            head_updates(matrix, adapted, case.base), head_updates(matrix, dense, case.base), strict=True
        )
        for factored, multiplied in pairs:
            assert (factored.gram - multiplied.gram).norm() < 1e-5 * multiplied.gram.norm()
            assert factored.shape == multiplied.shape


def test_the_factors_are_not_multiplied_out(llama, monkeypatch):
    read = []
    get = Adapted.__getitem__
    adapted, matrix = llama.open(), llama.map.matrices[0]
    monkeypatch.setattr(Adapted, "__getitem__", lambda self, name: read.append(name) or get(self, name))
    assert update_of(matrix, adapted, llama.base).norm > 0
    assert matrix.parameter not in read  # the run-time type checker reads the mapping's first


def test_an_adapter_is_multiplied_out_against_a_model_that_is_not_its_base(llama):
    adapted = llama.open()
    other = {name: tensor + 1 for name, tensor in llama.base.items()}
    matrix = llama.map.matrices[0]
    delta = adapted[matrix.parameter] - other[matrix.parameter]
    assert_close(update_of(matrix, adapted, other).gram, delta.T @ delta, rtol=1e-4, atol=1e-2)


def test_a_matrix_without_factors_has_not_moved(llama):
    for key in [key for key in llama.tensors if Q not in key]:
        del llama.tensors[key]
    adapted = llama.open()
    norms = {m.name: update_of(m, adapted, llama.base).norm for m in llama.map.matrices}
    assert [name for name, norm in norms.items() if norm > 0] == ["L0.q"]
    assert update_of(llama.map.matrices[1], adapted, llama.base).moved_share == 0


def test_the_moved_share_is_that_of_the_rows_and_columns_that_the_factors_touch(llama):
    llama[Q, "B"][:8] = 0
    llama[Q, "A"][:, :16] = 0
    update = update_of(llama.map.matrices[0], llama.open(), llama.base)
    assert update.moved_share == pytest.approx(24 / 32 * 16 / 32)


def test_a_rank_stabilised_adapter_is_scaled_by_the_root_of_its_rank(llama):
    adapted = llama.open(use_rslora=True)
    assert_close(adapted[f"{Q}.weight"], llama.merged(Q, 6 / sqrt(3)), rtol=1e-6, atol=1e-5)


def test_rank_and_alpha_follow_their_patterns_and_the_first_match_counts(llama):
    other = Q.replace("layers.0", "layers.1")
    llama[other, "A"], llama[other, "B"] = torch.ones(5, 32), torch.ones(32, 5)
    patterns = {"alpha_pattern": {r"layers\.1\..*q_proj": 10, "q_proj": 9}, "rank_pattern": {"q_proj": 5}}
    adapted = llama.open(**patterns)
    assert_close(adapted[f"{Q}.weight"], llama.merged(Q, 9 / 3), rtol=1e-6, atol=1e-5)
    assert_close(adapted[f"{other}.weight"], llama.merged(other, 10 / 5), rtol=1e-6, atol=1e-5)
    up = "model.layers.0.mlp.up_proj"
    assert_close(adapted[f"{up}.weight"], llama.merged(up, 6 / 3), rtol=1e-6, atol=1e-5)


def test_modules_that_were_saved_whole_replace_the_bases(llama):
    for part in "AB":
        del llama.tensors[f"base_model.model.{Q}.lora_{part}.weight"]
    whole = {f"{Q}.weight": torch.zeros(32, 32), "lm_head.weight": torch.ones(50, 32)}
    llama.tensors |= {f"base_model.model.{name}": tensor for name, tensor in whole.items()}
    adapted = llama.open()
    for name, tensor in whole.items():
        assert_close(adapted[name], tensor, rtol=0, atol=0)
    gram = update_of(llama.map.matrices[0], adapted, llama.base).gram
    assert_close(gram, llama.base[f"{Q}.weight"].T @ llama.base[f"{Q}.weight"], rtol=1e-4, atol=1e-4)


def test_a_norm_that_was_saved_whole_is_folded_into_the_written_update(tmp_path):
    case = Case("olmo2", tmp_path)
    o = next(m for m in case.map.matrices if m.kind == "o")
    assert o.norm is not None
    case.tensors[f"base_model.model.{o.norm.parameter}"] = torch.full((32,), 3.0)
    adapted = case.open()
    delta = o.written(adapted) - o.written(case.base)
    assert_close(update_of(o, adapted, case.base).gram, delta @ delta.T, rtol=1e-4, atol=1e-2)


def test_a_bfloat16_base_keeps_the_digits_of_its_update(llama):
    llama.base = {name: tensor.bfloat16() for name, tensor in llama.base.items()}
    adapted = llama.open()
    expected = llama.base[f"{Q}.weight"].float() + 2 * llama[Q, "B"] @ llama[Q, "A"]
    assert_close(adapted[f"{Q}.weight"], expected, rtol=1e-6, atol=1e-5)


def test_an_adapter_of_the_base_model_alone_gets_the_prefix(llama):
    llama.tensors = {
        key.replace("base_model.model.model.", "base_model.model."): tensor
        for key, tensor in llama.tensors.items()
    }
    adapted = llama.open()
    assert len(adapted.updates) == 14 and f"{Q}.weight" in adapted.updates


def test_an_adapter_of_an_old_gpt_neox_finds_its_unembedding(tmp_path):
    case = Case("gpt_neox", tmp_path)
    case["embed_out", "A"], case["embed_out", "B"] = torch.ones(3, 32), torch.ones(50, 3)
    adapted = case.open()
    assert_close(adapted["lm_head.weight"], case.base["lm_head.weight"] + 6, rtol=1e-6, atol=1e-5)


def test_what_is_opened_is_an_adapter_or_a_whole_checkpoint(llama, tmp_path):
    assert isinstance(open_checkpoint(llama.save(), llama.map, llama.base), Adapted)
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file(llama.base, whole / "model.safetensors")
    assert is_adapter(tmp_path) and not is_adapter(whole)
    opened, expected = open_checkpoint(whole, llama.map, llama.base), open_params(whole, llama.map)
    assert_close(dict(opened), dict(expected), rtol=0, atol=0)


def test_an_adapter_without_its_base_is_refused(llama):
    with pytest.raises(ValueError, match="is an adapter, which has no weights of its own: compare it with"):
        open_checkpoint(llama.save(), llama.map)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"peft_type": "IA3"}, r"is an adapter of type IA3, and only LORA is read: merge it into its base"),
        ({"use_dora": True}, r"is not a plain LoRA adapter \(use_dora=True\): merge it into its base"),
        ({"bias": "all"}, r"is not a plain LoRA adapter \(bias='all'\)"),
        ({"init_lora_weights": "pissa_niter_4"}, r"\(init_lora_weights='pissa_niter_4'\)"),
        (
            {"layer_replication": [[0, 2]], "lora_bias": True},
            r"\(lora_bias=True, layer_replication=\[\[0, 2\]\]\)",
        ),
    ],
)
def test_an_adapter_that_is_more_than_a_low_rank_update_is_refused(llama, options, message):
    with pytest.raises(ValueError, match=message):
        llama.open(**options)


@pytest.mark.parametrize("text", ["", "[]", "[" * 10**5])
def test_a_corrupt_adapter_config_is_refused(llama, text):
    (llama.save() / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json is truncated or corrupt; copy or download"):
        open_adapter(llama.directory, llama.map, llama.base)


def test_an_adapter_of_another_library_is_refused(llama):
    (llama.save() / "adapter_config.json").write_text('{"fine_tune_type": "lora", "lora_parameters": {}}')
    with pytest.raises(ValueError, match=r"adapter_config\.json has no peft_type, so PEFT did not save this"):
        open_adapter(llama.directory, llama.map, llama.base)


@pytest.mark.parametrize(
    "patterns, message",
    [
        ({"(a|aa)+[xy]": 3}, "takes too long to match"),
        ({"(": 3}, r"has an alpha_pattern that is no regular expression, or a huge one: '\('"),
        ({"(?R)": 3}, r"no regular expression, or a huge one: '\(\?R\)'"),
        ({"((a{100}){100}){100}": 3}, r"no regular expression, or a huge one"),
        ({"q" * 200_000: 3}, r"no regular expression, or a huge one"),
        ({"q_proj": 10**400}, r"has an alpha that is no number: 10"),
        ({"q_proj": "much"}, "has an alpha that is no number: 'much'"),
        ([1], r"has an alpha_pattern that is no mapping: \[1\]"),
    ],
)
def test_hostile_alphas_are_refused(llama, patterns, message, monkeypatch):
    monkeypatch.setattr("weightgeom.models.adapters.MATCHING", 0.1)
    long = "model." + "a" * 60
    key = f"base_model.model.{long}.weight"
    llama.base |= {f"{long}.weight": torch.zeros(32, 32)}
    for part, shape in (("A", (3, 32)), ("B", (32, 3))):
        llama.tensors[key.replace(".weight", f".lora_{part}.weight")] = torch.ones(shape)
    with pytest.raises(ValueError, match=message):
        llama.open(alpha_pattern=patterns)


@pytest.mark.parametrize("alpha", [None, "8", True, float("nan")])
def test_an_alpha_that_is_no_number_is_refused(llama, alpha):
    with pytest.raises(ValueError, match="has an alpha that is no number"):
        llama.open(lora_alpha=alpha)


def test_a_whole_checkpoint_and_an_adapter_in_one_directory_are_refused(llama):
    save_file(llama.base, llama.save() / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"holds both a whole checkpoint and an adapter: move the adapter_\*"
    ):
        open_checkpoint(llama.directory, llama.map, llama.base)


def test_another_base_than_the_adapters_is_named_in_a_warning(llama, tmp_path, caplog):
    llama.save(base_model_name_or_path="lab/base-7b")
    for before in (
        "other/Base-7B@abc",
        "cache/models--lab--base-7b/snapshots/abc",
        str(tmp_path / "base-7b/"),
    ):
        warn_of_other_base(llama.directory, before)
        assert not caplog.text
    warn_of_other_base(llama.directory, "lab/base-13b@abc")
    assert (
        "was trained on lab/base-7b by its own account, and is compared with lab/base-13b@abc" in caplog.text
    )


def test_a_truncated_adapter_is_refused(llama):
    path = llama.save() / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is truncated or corrupt"):
        open_adapter(llama.directory, llama.map, llama.base)


def test_an_adapter_without_safetensors_is_refused(llama):
    (llama.save() / "adapter_model.safetensors").rename(llama.directory / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only adapter_model\.bin: safetensors is required, so save"):
        open_adapter(llama.directory, llama.map, llama.base)


@pytest.mark.parametrize(
    "key", ["base_model.model.encoder.proj.lora_A.weight", "base_model.model.model.prompt", f"{Q}.weight"]
)
def test_a_target_that_the_base_lacks_is_refused_by_name(llama, key):
    llama.tensors[key] = torch.ones(3, 32)
    with pytest.raises(ValueError, match=f"holds {key}, which is no LoRA factor or weight of the base"):
        llama.open()


def test_an_adapter_of_another_width_is_refused_with_both_shapes(llama):
    llama[Q, "A"] = torch.ones(3, 64)
    shapes = r"by a matrix of shape \(32, 64\), and the base's is of shape \(32, 32\)"
    with pytest.raises(ValueError, match=f"changes {Q}.weight {shapes}: this adapter belongs to another"):
        llama.open()


def test_a_factor_without_its_match_is_refused(llama):
    llama[Q, "B"] = torch.ones(32, 4)
    message = f"has no two matching factors lora_A and lora_B for {Q}.weight"
    with pytest.raises(ValueError, match=message):
        llama.open()
    del llama.tensors[f"base_model.model.{Q}.lora_B.weight"]
    with pytest.raises(ValueError, match=message):
        llama.open()


def test_a_factor_that_is_not_finite_is_refused_when_its_update_is_measured(llama):
    llama[Q, "B"][3, 1] = float("nan")
    with pytest.raises(ValueError, match=r"the update of L0\.q has entries that are not finite"):
        update_of(llama.map.matrices[0], llama.open(), llama.base)


def test_the_gram_matrix_of_a_known_rank_one_update():
    # dW = (1, 2)ᵀ (3, 0, 4): dWᵀ dW = 5 · (3, 0, 4)ᵀ (3, 0, 4), dW dWᵀ = 25 · (1, 2)ᵀ (1, 2)
    update = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 0.0, 4.0]]))
    assert_close(update.gram(True), 5 * torch.tensor([[9.0, 0, 12], [0, 0, 0], [12, 0, 16]]))
    assert_close(update.gram(False), 25 * torch.tensor([[1.0, 2], [2, 4]]))

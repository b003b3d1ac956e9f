from functools import cache

import pytest
import torch
from networks import CONFIGS
from torch.func import functional_call
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from weightgeom.models.residual import ResidualMatrix, architecture_of
from weightgeom.models.weights import open_params

TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5]])

received = []  # what attention was given, call by call: query, key, value


def recording_attention(module, query, key, value, mask, **options):
    received.append((query, key, value))
    options.pop("softcap", None)  # Gemma-2's, which sdpa lacks; what attention is given stays
    return sdpa_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register("recording", recording_attention)
AttentionMaskInterface.register("recording", sdpa_mask)


class Network:
    """A small random network in float64, its map, and what flows through it."""

    def __init__(self, config):
        config._attn_implementation = "recording"
        self.config = config
        self.model = AutoModelForCausalLM.from_config(config).double().eval()
        self.model.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            gain = "norm" in name or ".ln_" in name
            parameter.copy_(noise / 4 + (1 if gain and name.endswith("weight") else 0))
        self.params = dict(self.model.named_parameters())
        self.map = architecture_of(config)
        self.first = {m.kind: m for m in self.map.matrices if m.layer == 0}
        self.site = {site.name: site.module for site in self.map.sites if site.layer == 0}

    def run(self, params):
        return functional_call(self.model, dict(params), (TOKENS,), {"output_hidden_states": True})

    def logits(self, params):
        return self.run(params).logits

    def flow(self, path, params=None):
        """The input and the output of the module at `path`."""
        flows = []
        hook = self.model.get_submodule(path).register_forward_hook(
            lambda module, inputs, output: flows.append((inputs[0], output))
        )
        self.run(params or self.params)
        hook.remove()
        return flows[0]

    def bias(self, matrix, params=None):
        """The rows of the module's bias that belong to `matrix`, zero where it has none."""
        params = params or self.params
        bias = params.get(f"{matrix.module}.bias")
        if bias is None:
            return torch.zeros(matrix.of(params).shape[0], dtype=torch.float64)
        alone = ResidualMatrix(0, matrix.kind, "bias", rows=matrix.rows)
        return alone.of({"bias.weight": bias[:, None]})[:, 0]

    def apply(self, matrix, a):
        """W a + b, from the map alone."""
        return a @ matrix.of(self.params).T + self.bias(matrix)

    def without_bias(self):
        """The parameters with the biases of every mapped module at zero."""
        biases = {f"{matrix.module}.bias" for matrix in self.map.matrices}
        return {
            name: torch.zeros_like(value) if name in biases else value for name, value in self.params.items()
        }


@cache
def built(name):
    return Network(CONFIGS[name](50, 16))


@pytest.fixture(params=CONFIGS)
def network(request):
    return built(request.param)


@pytest.fixture(params=[name for name in CONFIGS if not name.startswith("gpt")])
def gated(request):
    return built(request.param)


def zero(matrix, params):
    return matrix.replaced(params, torch.zeros_like(matrix.of(params)))


def scaled(matrix, params, factor):
    return matrix.replaced(params, factor * matrix.of(params))


def head_blocks(matrix, flow):
    """The activations of `matrix`'s heads: (batch, token, head, d_head)."""
    return flow.unflatten(-1, (matrix.heads, -1))


def close(actual, expected):
    # RMS norms compute in float32 whatever their input, which leaves about 1e-7 relative.
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_k_matters_through_q_alone(network):
    q, k = network.first["q"], network.first["k"]
    params = network.without_bias()
    silent = zero(q, params)
    close(network.logits(scaled(k, silent, -2)), network.logits(silent))
    change = network.logits(scaled(k, params, -2)) - network.logits(params)
    assert change.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_attention_receives_what_the_matrix_makes_of_its_site(network, kind):
    matrix = network.first[kind]
    received.clear()
    a, _ = network.flow(network.site["attention_input"])
    actual = received[0]["qkv".index(kind)].transpose(1, 2)  # to (batch, token, head, d_head)
    expected = network.apply(matrix, a)
    attention = network.model.get_submodule(matrix.module.rpartition(".")[0])
    norm = getattr(attention, f"{kind}_norm", None)  # of all heads in OLMo-2, of each in Qwen3
    if norm is not None:
        expected = norm(expected.unflatten(-1, (-1, norm.weight.numel()))).flatten(-2)
    # Rotary positions turn q and k at every token but the first.
    tokens = slice(None) if kind == "v" else slice(1)
    close(head_blocks(matrix, expected)[:, tokens], actual[:, tokens])


def test_a_value_group_reaches_the_query_heads_of_its_group_alone(network):
    v, o = network.first["v"], network.first["o"]
    before, _ = network.flow(o.module)
    for group in range(v.heads):
        rows = v.of(network.params).clone().unflatten(0, (v.heads, -1))
        rows[group] += 1
        after, _ = network.flow(o.module, v.replaced(network.params, rows.flatten(0, 1)))
        moved = head_blocks(o, after - before).abs().amax(dim=(0, 1, 3)) > 1e-6
        share = o.heads // v.heads
        assert moved.nonzero()[:, 0].tolist() == list(range(group * share, (group + 1) * share))


def test_o_is_the_only_way_from_values_to_logits(network):
    o, v = network.first["o"], network.first["v"]
    silent = zero(v, network.without_bias())
    close(network.logits(zero(o, silent)), network.logits(silent))
    close(network.logits(zero(o, network.without_bias())), network.logits(silent))


@pytest.mark.parametrize("kind", ["o", "down"])
def test_a_write_is_linear_in_its_matrix(network, kind):
    matrix = network.first[kind]
    _, before = network.flow(matrix.module)
    _, after = network.flow(matrix.module, scaled(matrix, network.params, 3))
    bias = network.bias(matrix)
    close(after - bias, 3 * (before - bias))


@pytest.mark.parametrize("kind, other", [("o", "down"), ("down", "o")])
def test_the_residual_stream_moves_by_what_is_written(network, kind, other):
    matrix = network.first[kind]
    params = zero(network.first[other], network.without_bias())
    a, output = network.flow(matrix.module, params)
    states = network.run(params).hidden_states
    eps = getattr(network.config, "rms_norm_eps", 0.0)
    rms = (output.square().mean(-1, keepdim=True) + eps).sqrt() if matrix.norm else 1
    close(states[1] - states[0], a @ matrix.written(params).T / rms)


def test_written_differs_from_the_matrix_where_a_norm_follows_it_and_nowhere_else(network):
    post_norms = network.config.model_type in ("olmo2", "gemma2")
    for matrix in network.map.matrices:
        same = torch.equal(matrix.written(network.params), matrix.of(network.params))
        assert same == (matrix.role == "read" or not post_norms)


def test_a_layer_without_o_and_down_adds_nothing(network):
    params = zero(network.first["o"], zero(network.first["down"], network.without_bias()))
    states = network.run(params).hidden_states
    close(states[1], states[0])


def test_the_mlp_reads_up_and_gate_at_its_site(network):
    a, _ = network.flow(network.site["mlp_input"])
    hidden, _ = network.flow(network.first["down"].module)
    config, up = network.config, network.apply(network.first["up"], a)
    if "gate" in network.first:
        name = getattr(config, "hidden_activation", None) or config.hidden_act
        expected = ACT2FN[name](network.apply(network.first["gate"], a)) * up
    else:
        name = getattr(config, "activation_function", None) or config.hidden_act
        expected = ACT2FN[name](up)
    close(hidden, expected)


def test_a_gate_matters_through_up_alone(gated):
    up, gate = gated.first["up"], gated.first["gate"]
    silent = zero(up, gated.params)
    close(gated.logits(scaled(gate, silent, -2)), gated.logits(silent))
    change = gated.logits(scaled(gate, gated.params, -2)) - gated.logits(gated.params)
    assert change.abs().max() > 1e-3


def test_the_hidden_layer_is_linear_in_up_and_not_in_gate(gated):
    down = gated.first["down"].module
    before, _ = gated.flow(down)
    negated_up, _ = gated.flow(down, scaled(gated.first["up"], gated.params, -1))
    negated_gate, _ = gated.flow(down, scaled(gated.first["gate"], gated.params, -1))
    close(negated_up, -before)
    assert (negated_gate + before).abs().max() > 1e-3


def test_the_logits_are_the_unembedding_of_the_normalised_state_times_its_gain(network):
    norm = network.map.final_norm
    path = norm.parameter.removesuffix(".weight")
    state, _ = network.flow(path)
    if f"{path}.bias" in network.params:  # LayerNorm
        state = state - state.mean(-1, keepdim=True)
        bias, eps = network.params[f"{path}.bias"], network.model.get_submodule(path).eps
    else:
        bias, eps = 0, network.config.rms_norm_eps
    state = state / (state.square().mean(-1, keepdim=True) + eps).sqrt()
    unembedding = network.map.unembedding(network.params)
    logits = (state * norm.gain(network.params) + bias) @ unembedding.T
    cap = getattr(network.config, "final_logit_softcapping", None)
    expected = logits if cap is None else cap * torch.tanh(logits / cap)
    close(network.logits(network.params), expected)


def test_the_embedding_has_one_row_for_each_token(network):
    embedding, scale = network.params[network.map.embed], 1
    if network.config.model_type == "gemma2":
        scale = network.config.hidden_size**0.5
    _, lookup = network.flow(network.map.embed.removesuffix(".weight"))
    close(lookup, scale * embedding[TOKENS])


def test_olmo2_reads_the_stream_itself_and_llama_a_normed_one():
    for name, raw in (("olmo2", True), ("llama", False)):
        network = built(name)
        a, _ = network.flow(network.site["attention_input"])
        stream = network.run(network.params).hidden_states[0]
        assert torch.equal(a, stream) == raw


def test_every_weight_inside_a_layer_is_mapped_exactly_once(network):
    covered = {}
    for name, parameter in network.params.items():
        entries = torch.arange(float(parameter.numel())).reshape(parameter.shape)
        covered[name] = (entries, [])
    for matrix in network.map.matrices:
        entries, parts = covered[matrix.parameter]
        parts.append(matrix.of({matrix.parameter: entries}).flatten())
    for name, (entries, parts) in covered.items():
        inside = ".0." in name or ".1." in name
        if inside and entries.ndim == 2:
            assert_close(torch.cat(parts).sort().values, entries.flatten())
        else:
            assert parts == []


def test_every_matrix_has_the_sizes_of_the_map(network):
    map = network.map
    heads = {"q": map.n_heads, "o": map.n_heads, "k": map.n_kv_heads, "v": map.n_kv_heads}
    for matrix in map.matrices:
        d_out, d_in = matrix.of(network.params).shape
        stream, inner = (d_in, d_out) if matrix.role == "read" else (d_out, d_in)
        assert stream == map.d_model == network.config.hidden_size
        if matrix.kind in heads:
            assert matrix.heads == heads[matrix.kind] and inner == matrix.heads * map.d_head


def test_every_layer_has_both_sites_and_the_same_matrices(network):
    layers = range(network.map.n_layers)
    assert network.map.n_layers == 2
    kinds = [[m.kind for m in network.map.matrices if m.layer == layer] for layer in layers]
    assert kinds[0] == kinds[1]
    for layer in layers:
        sites = [site.name for site in network.map.sites if site.layer == layer]
        assert sorted(sites) == ["attention_input", "mlp_input"]


def test_a_saved_checkpoint_reads_back_under_the_names_in_memory(network, tmp_path):
    network.model.save_pretrained(tmp_path)
    stored = open_params(tmp_path, network.map)
    assert_close(dict(stored), dict(network.params), rtol=0, atol=0)


def test_a_saved_base_model_reads_back_under_the_names_in_memory(network, tmp_path):
    network.model.base_model.save_pretrained(tmp_path)
    stored = open_params(tmp_path, network.map)
    expected = {name: p for name, p in network.params.items() if name != network.map.unembed}
    assert_close(dict(stored), expected, rtol=0, atol=0)

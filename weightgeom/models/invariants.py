"""The claims of a residual map, each checked by the behaviour of a small random network."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from weightgeom.models.residual import ATTENTION, INPUTS, Kind, ResidualMatrix, module_path
from weightgeom.models.specimen import TOKENS, Change, Flow, Specimen
from weightgeom.models.weights import open_params
from weightgeom.params import Params

TOKEN = 2  # the one whose query, key or value is changed
ALL = slice(None)  # tokens
TOLERANCE = 1e-5  # RMS norms and some attentions compute in float32: about 1e-7 of each number
MOVED = 3e-6  # a smaller change is none
MLPS: tuple[tuple[Kind, Kind, Kind], ...] = (
    ("gate", "up", "down"),
    ("shared_gate", "shared_up", "shared_down"),
)
QUERIES: tuple[Kind, ...] = ("q", "q_a")
KEYS_OF: Mapping[Kind, tuple[Kind, ...]] = {  # the matrices through which each kind acts
    **dict.fromkeys(QUERIES, ("k", "k_rope")),
    "linear_q": ("linear_k",),
    "mamba_C": ("mamba_B",),
}
KEYS: tuple[Kind, ...] = ("k", "k_rope", "kv_a")
COMPLETE = tuple(
    frozenset(kinds.split())
    for kinds in (
        "linear_q linear_k linear_v linear_z linear_b linear_a linear_o",
        "conv_B conv_C conv_x conv_o",
        "mamba_z mamba_x mamba_B mamba_C mamba_dt mamba_o",
        "up down",
    )
)
REACH: Mapping[Kind, Literal["token", "kernel", "later"]] = {
    **dict.fromkeys(("linear_z", "conv_C", "mamba_z"), "token"),  # gates of the output
    **dict.fromkeys(("linear_q", "conv_B", "conv_x", "mamba_C"), "kernel"),  # through the convolution alone
    **dict.fromkeys(("linear_k", "linear_v", "linear_b", "linear_a"), "later"),  # through the state
    **dict.fromkeys(("mamba_x", "mamba_B", "mamba_dt"), "later"),
}
UNITS: tuple[Kind, ...] = (*("linear_v", "linear_z", "conv_B", "conv_C", "conv_x", "mamba_z", "mamba_x"),)
Invariant = Callable[[Specimen], None]
"""Checks the claim in the first line of its docstring; raises ValueError if it does not hold."""


def parts_exist(specimen: Specimen) -> None:
    """Every parameter and module of the map is in the network."""
    architecture = specimen.architecture
    norms = [architecture.final_norm, *(m.norm for m in architecture.matrices if m.norm is not None)]
    parameters = {architecture.embed, *(norm.parameter for norm in norms)}
    parameters |= {matrix.parameter for matrix in architecture.matrices} | set(architecture.inner)
    if absent := sorted(parameters - set(specimen.params)):
        raise ValueError(f"the network has no parameter {absent[0]}")
    modules = {site.module for site in architecture.sites} | {architecture.unembed.removesuffix(".weight")}
    if absent := sorted(modules - {name for name, _ in specimen.network.named_modules()}):
        raise ValueError(f"the network has no module {absent[0]}")


def sizes_agree(specimen: Specimen) -> None:
    """Widths, heads and layers are those of the network's config."""
    architecture, config = specimen.architecture, specimen.network.config
    groups = getattr(config, "num_key_value_heads", None)
    if groups is None:
        keys = next(specimen.of_kind("k")).of(specimen.params)
        groups = len(keys) // architecture.d_head
    sizes = {
        "d_model": (architecture.d_model, config.hidden_size),
        "n_layers": (architecture.n_layers, config.num_hidden_layers),
        "n_heads": (architecture.n_heads, config.num_attention_heads),
        "n_kv_heads": (architecture.n_kv_heads, groups),
    }
    for name, (mapped, actual) in sizes.items():
        _require(mapped == actual, f"{name} is {mapped} in the map and {actual} in the config")
    widths = dict.fromkeys("kvo", architecture.d_head) | {"q": architecture.d_query or architecture.d_head}
    heads = {"q": architecture.n_heads, "o": architecture.n_heads}
    heads |= {"k": architecture.n_kv_heads, "v": architecture.n_kv_heads}
    for matrix in architecture.matrices:
        d_out, d_in = matrix.of(specimen.params).shape
        stream, inner = (d_in, d_out) if matrix.role == "read" else (d_out, d_in)
        _require(stream == architecture.d_model, f"{matrix.name} is {stream} wide on the residual side")
        if matrix.kind in heads:
            _require(
                matrix.heads == heads[matrix.kind] and inner == matrix.heads * widths[matrix.kind],
                f"{matrix.name} has {inner} rows or columns for {matrix.heads} heads, and the map"
                f" {heads[matrix.kind]} heads of {widths[matrix.kind]}",
            )


def layers_are_complete(specimen: Specimen) -> None:
    """The attention, mixer and MLP (or experts) of every layer have all their matrices and an input site.

    Attention whose config names the ranks of latents has the matrices that read them for q, k and v.
    """
    architecture, config = specimen.architecture, specimen.network.config
    low_rank = getattr(config, "kv_lora_rank", None) is not None
    attention = {"kv_a", "k_rope"} if low_rank else {"k", "v"}
    attention |= {"q_a" if low_rank and config.q_lora_rank is not None else "q", "o"}
    for layer in range(architecture.n_layers):
        here = [matrix for matrix in architecture.matrices if matrix.layer == layer]
        kinds, blocks = {matrix.kind for matrix in here}, {matrix.block for matrix in here}
        _require(bool(blocks), f"layer {layer} has no matrices")
        expected = attention if "attention" in blocks else set()
        expected = expected.union(
            *(block_kinds for block_kinds in COMPLETE if not kinds.isdisjoint(block_kinds))
        )
        if absent := expected - kinds:
            raise ValueError(f"layer {layer} has no {', '.join(sorted(absent))}")
        sites = sorted(site.name for site in architecture.sites if site.layer == layer)
        inputs = sorted({INPUTS[matrix.block] for matrix in here})
        _require(sites == inputs, f"layer {layer} has the sites {', '.join(sites)}")


def every_weight_is_mapped_once(specimen: Specimen) -> None:
    """Every entry of every matrix in a layer belongs to one matrix of the map, or to an inner one.

    The kernels of a convolution that mixes no channels are no matrices.
    """
    architecture = specimen.architecture
    entries = {
        name: torch.arange(float(parameter.numel())).reshape(parameter.shape)
        for name, parameter in specimen.params.items()
    }
    mapped: dict[str, list[Tensor]] = {name: [] for name in entries}
    for matrix in architecture.matrices:
        mapped[matrix.parameter].append(matrix.of(entries).flatten())
    layers = tuple(f"{module_path(architecture, layer)}." for layer in range(architecture.n_layers))
    for name, parts in mapped.items():
        is_matrix = entries[name].ndim > 1 and not name.endswith("bias")  # experts' biases are in stacks
        is_matrix = is_matrix and not _is_by_channel(specimen, name)
        inside = is_matrix and name.startswith(layers) and name not in architecture.inner
        expected = entries[name].flatten() if inside else torch.zeros(0)
        covered = torch.cat(parts).sort().values if parts else torch.zeros(0)
        _require(
            torch.equal(covered, expected), f"the map has {len(covered)} of the {len(expected)} of {name}"
        )


def modules_apply_their_matrices(specimen: Specimen) -> None:
    """The output of a module is its matrix, as the map has it, times the input, and its bias."""
    for matrix in (matrix for matrix in specimen.architecture.matrices if matrix.is_layer):
        a, output = specimen.flow.inputs[matrix.module], specimen.flow.outputs[matrix.module]
        places = _places(matrix, specimen.params)
        expected = a @ matrix.of(specimen.params).T + _bias(specimen, matrix.module)[places]
        _require(_close(output[:, places], expected), f"{matrix.module} does not apply {matrix.name}")


def inputs_are_at_their_site(specimen: Specimen) -> None:
    """The attention site is the input of q, k and v, and the MLP site that of gate, up and router.

    So it is of the matrices that read latents for q, k and v, of a shared expert, and of a mixer.
    """
    reads = (m for m in specimen.architecture.matrices if m.role == "read" and m.expert is None)
    for matrix in reads:
        actual = specimen.flow.inputs[matrix.module]
        expected = specimen.flow.inputs[specimen.site(matrix.layer, matrix.site)]
        _require(_close(actual, expected), f"{matrix.name} has another input than the site {matrix.site}")


def queries_act_at_their_token_and_head(specimen: Specimen) -> None:
    """A query changes the attention output of its own token and head alone, its latent that of all heads."""
    for q in specimen.of_kind(*QUERIES):
        for head, places in enumerate(_heads(q, specimen.params)):
            moved = _moved(specimen, q, partial(_rolled, places))
            expected = torch.zeros_like(moved)
            share = moved.shape[1] // q.heads
            expected[TOKEN, head * share : (head + 1) * share] = True
            _require(torch.equal(moved, expected), _in_words(q, head, moved))


def keys_act_on_later_tokens_of_their_group(specimen: Specimen) -> None:
    """A key changes the attention output of its own and later tokens, in the heads of its group alone.

    The rotary part of keys that are made of a latent, and the latent itself, belong to all heads.
    """
    for k in specimen.of_kind(*KEYS):
        for group, places in enumerate(_heads(k, specimen.params)):
            moved = _moved(specimen, k, partial(_rolled, places))
            _require(_is_of_group(moved, group, k.heads), _in_words(k, group, moved))


def values_act_linearly_on_their_group(specimen: Specimen) -> None:
    """A value changes the same attention output as its key does, linearly."""
    for v in specimen.of_kind("v"):
        for group, places in enumerate(_heads(v, specimen.params)):
            moved = _moved(specimen, v, partial(_shifted, places, 1.0, TOKEN))
            _require(_is_of_group(moved, group, v.heads), _in_words(v, group, moved))
        module = specimen.matrix(v.layer, "o").module
        places = _places(v, specimen.params)
        _require(_is_linear(specimen, v.module, places, module), f"the output of {v.name} acts non-linearly")


def gates_act_at_their_unit(specimen: Specimen) -> None:
    """A row of the attention gate changes its own token and unit of the attention output alone."""
    for gate in specimen.of_kind("attention_gate"):
        o, places = specimen.matrix(gate.layer, "o").module, _places(gate, specimen.params)
        for unit in _some(len(places)):
            change = partial(_shifted, places[unit : unit + 1], 1.0, TOKEN)
            after = specimen.run(changes={gate.module: change})
            moved = (after.inputs[o] - specimen.flow.inputs[o]).abs() > MOVED
            changed = moved.nonzero().tolist()
            _require(
                changed == [[TOKEN, unit]],
                f"row {unit} of {gate.name} at token {TOKEN} changes the attention output at {changed}",
            )


def keys_act_through_queries(specimen: Specimen) -> None:
    """With q at zero, k does not matter; nor, of keys that are made of a latent, their rotary part.

    So it is in linear attention, and with C and B of Mamba-2, where q does not matter with k at zero either.
    """
    for q in specimen.of_kind(*KEYS_OF):
        k = specimen.matrix(q.layer, *KEYS_OF[q.kind])
        silent = _zero(q, specimen.unbiased)
        _require(
            _same_logits(specimen, silent, _scaled(k, silent)), f"{k.name} matters with {q.name} at zero"
        )
        unchanged = _same_logits(specimen, specimen.unbiased, _scaled(k, specimen.unbiased))
        _require(not unchanged, f"{k.name} never matters")
        if q.block == "mixer":  # k, and not the strength or the step of the writing
            silent = _zero(k, specimen.unbiased)
            _require(
                _same_logits(specimen, silent, _scaled(q, silent)), f"{q.name} matters with {k.name} at zero"
            )


def values_act_through_o(specimen: Specimen) -> None:
    """With o at zero, v does not matter, nor does o with v, or the latent of values, at zero."""
    for o in specimen.of_kind("o"):
        v = specimen.matrix(o.layer, "v", "kv_a")
        silent = _zero(v, specimen.unbiased)
        for params in (_zero(o, silent), _zero(o, specimen.unbiased)):
            _require(
                _same_logits(specimen, silent, params), f"{v.name} and {o.name} act one without the other"
            )


def latents_carry_keys_and_values(specimen: Specimen) -> None:
    """With q at zero, the latent of keys and values still matters: its values do."""
    for kv in specimen.of_kind("kv_a"):
        silent = _zero(specimen.matrix(kv.layer, *QUERIES), specimen.unbiased)
        _require(
            not _same_logits(specimen, silent, _scaled(kv, silent)),
            f"{kv.name} does not matter with the queries at zero: it has no values",
        )


def inner_matrices_lie_between(specimen: Specimen) -> None:
    """An inner matrix takes in outputs of the layer's reads alone, and matters through its writes alone."""
    architecture = specimen.architecture
    for name in architecture.inner:
        layer = next(
            layer
            for layer in range(architecture.n_layers)
            if name.startswith(f"{module_path(architecture, layer)}.")
        )
        silent = deaf = specimen.unbiased
        for matrix in (m for m in architecture.matrices if m.layer == layer and m.kind in ATTENTION):
            silent = _zero(matrix, silent) if matrix.role == "write" else silent
            deaf = _zero(matrix, deaf) if matrix.role == "read" else deaf
        a = specimen.run(deaf).inputs[name.removesuffix(".weight")]
        _require(_close(a, torch.zeros_like(a)), f"{name} takes in more than the reads of its layer put out")
        for params, matters in ((silent, False), (specimen.unbiased, True)):
            scaled = {**params, name: -2 * params[name]}
            _require(
                _same_logits(specimen, params, scaled) != matters,
                f"{name} {'never matters' if matters else 'matters with the writes of its layer at zero'}",
            )


def writes_reach_the_stream(specimen: Specimen) -> None:
    """A layer adds its write matrices' outputs, through their norm, to the residual stream, and no more."""
    architecture = specimen.architecture
    for layer in range(architecture.n_layers):
        path = module_path(architecture, layer)
        of_layer = [matrix for matrix in architecture.matrices if matrix.layer == layer]
        writes = [matrix for matrix in of_layer if matrix.role == "write"]
        silent = specimen.unbiased
        for matrix in writes:
            silent = _zero(matrix, silent)
        flow = specimen.run(silent)
        added = flow.outputs[path] - flow.inputs[path]
        _require(_close(added, torch.zeros_like(added)), f"layer {layer} writes with all that writes at zero")
        for matrix in (matrix for matrix in writes if matrix.is_layer):
            params = matrix.replaced(silent, matrix.of(specimen.params))
            flow = specimen.run(params)
            added = flow.outputs[path] - flow.inputs[path]
            expected = flow.inputs[matrix.module] @ matrix.written(params).T
            weighted = matrix.kind == "shared_down" and "shared_router" in {m.kind for m in of_layer}
            if matrix.norm is not None or weighted:  # which gives each token a size of its own
                added, expected = _directions(added), _directions(expected)
            _require(
                _close(added, expected),
                f"{matrix.name} adds to the residual stream other than the map says: a norm or a factor",
            )
        if layer in {router.layer for router in specimen.of_kind("router")}:
            silent = specimen.unbiased
            for matrix in (matrix for matrix in writes if matrix.block != "mlp"):
                silent = _zero(matrix, silent)
            flow = specimen.run(silent)
            added, block = flow.outputs[path] - flow.inputs[path], specimen.site(layer, "mlp_input")
            _require(_close(added, flow.outputs[block]), f"{block} is not all that the experts add")


def hidden_units_stay_apart(specimen: Specimen) -> None:
    """A unit of up or gate reaches the column of down with its number alone, behind a gate linearly."""
    for up, gates, down in _mlps(specimen):
        for matrix in (up, *gates):
            places = _places(matrix, specimen.params)
            for unit in _some(len(places)):
                after = specimen.run(
                    changes={matrix.module: partial(_shifted, places[unit : unit + 1], 3.0, ALL)}
                )
                moved = (after.inputs[down] - specimen.flow.inputs[down]).abs().amax(0) > MOVED
                columns = moved.nonzero()[:, 0].tolist()
                _require(
                    columns == [unit], f"row {unit} of {matrix.name} reaches the columns {columns} of down"
                )
        if gates:
            is_linear = _is_linear(specimen, up.module, _places(up, specimen.params), down)
            _require(is_linear, f"the output of {up.name} acts non-linearly: it may be the gate")


def gates_act_through_up(specimen: Specimen) -> None:
    """With up at zero, its gate does not matter."""
    for up, gates, _ in _mlps(specimen):
        silent = _zero(up, specimen.unbiased)
        for gate in gates:
            _require(
                _same_logits(specimen, silent, _scaled(gate, silent)), f"{gate.name} matters with up at zero"
            )


def mixers_act_in_their_time_and_heads(specimen: Specimen) -> None:
    """A mixer's rows change their group of heads: at their own token, within the kernel, or from then on.

    A gate, which acts at its own token, does so behind the scan and behind any norm of its output.
    """
    lasting = {  # states decay so slowly that the first token's write still reaches the last one
        name: parameter - 2 if name.endswith("A_log") else parameter
        for name, parameter in specimen.params.items()
    }
    flow = specimen.run(lasting)
    for matrix in specimen.of_kind(*REACH):
        o, core = _mixer(specimen, matrix.layer)
        reach, share = REACH[matrix.kind], o.heads // matrix.heads
        last = {"token": 1, "kernel": _kernel(specimen, o), "later": len(TOKENS[0])}[reach]
        for head, places in enumerate(_heads(matrix, specimen.params)):
            expected = torch.zeros(len(TOKENS[0]), o.heads, dtype=torch.bool)
            expected[TOKEN : TOKEN + last, head * share : (head + 1) * share] = True
            after = specimen.run(lasting, {matrix.module: partial(_shifted, places, 3.0, TOKEN)})
            moved = _changed(flow, after, o if reach == "token" else replace(o, module=core))
            if reach == "token" and core != o.module:
                within = _changed(flow, after, replace(o, module=core))
                _require(not within.any(), f"{matrix.name} acts in front of the norm of the mixer's output")
                expected[TOKEN] |= moved[TOKEN]  # the norm may be of several heads
            _require(torch.equal(moved, expected), _in_words(matrix, head, moved))


def mixer_units_stay_apart(specimen: Specimen) -> None:
    """A row of a mixer's values or of its gates, at zero, silences its own unit of the output alone."""
    for matrix in specimen.of_kind(*UNITS):
        o, _ = _mixer(specimen, matrix.layer)
        weight = matrix.of(specimen.params)
        for unit in _some(len(weight)):
            rows = weight.clone()
            rows[unit] = 0
            output = specimen.run(matrix.replaced(specimen.unbiased, rows)).inputs[o.module]
            silent = (output == 0).all(0).nonzero()[:, 0].tolist()
            _require(silent == [unit], f"row {unit} of {matrix.name}, at zero, silences the units {silent}")


def decays_act_on_the_past(specimen: Specimen) -> None:
    """The decay of linear attention does nothing at the first token, where there is no state yet."""
    acting: dict[Kind, bool] = {"linear_a": False, "linear_b": True}
    for kind, expected in acting.items():
        for matrix in specimen.of_kind(kind):
            o, core = _mixer(specimen, matrix.layer)
            places = _places(matrix, specimen.params)
            after = specimen.run(changes={matrix.module: partial(_shifted, places, 1.0, 0)})
            acts = bool(_changed(specimen.flow, after, replace(o, module=core)).any())
            _require(
                acts == expected, f"{matrix.name} {'acts' if acts else 'does not act'} at the first token"
            )


def experts_are_their_own(specimen: Specimen) -> None:
    """An expert acts on the tokens that its row of the router chooses, affinely in down and in up alone.

    In up it does so behind a gate. It is silent with down at zero. With up at zero it need not be: gpt-oss
    adds 1 to the output of up.
    """
    for router, matrices in specimen.experts():
        block = specimen.site(router.layer, "mlp_input")
        a, down = specimen.run(specimen.unbiased).inputs[block], matrices["down"]
        rows = torch.zeros_like(router.of(specimen.params))
        rows[down.expert] = a[0]  # chosen where a @ a[0] > 0: the scores of the others are 0
        params = router.replaced(specimen.unbiased, rows)

        def added(changed: Params, block: str = block) -> Tensor:
            return specimen.run(changed).outputs[block]

        silent = added(_zero(down, params))
        whole = added(params) - silent
        reached = whole.abs().amax(1) > MOVED
        _require(
            torch.equal(reached, a @ a[0] > 0), f"{down.name} does not act where its router row chooses it"
        )
        for kind, matrix in matrices.items():
            expected = kind == "down" or (kind == "up" and "gate" in matrices)
            half = matrix.replaced(params, -matrix.of(params) / 2)  # small: gpt-oss cuts off large outputs
            at_zero = added(_zero(matrix, params)) - silent
            is_affine = _close(added(half) - silent - at_zero, -(whole - at_zero) / 2)
            _require(
                is_affine == expected,
                f"the output of {block} is {'affine' if is_affine else 'not affine'} in {matrix.name}",
            )


def shared_routers_weight_the_shared_expert(specimen: Specimen) -> None:
    """With the down of the shared expert at zero, its router does not matter, nor do its reads."""
    for down in specimen.of_kind("shared_down"):
        silent = _zero(down, specimen.unbiased)
        for matrix in specimen.of_kind("shared_router", "shared_gate", "shared_up"):
            if matrix.layer == down.layer:
                _require(
                    _same_logits(specimen, silent, _scaled(matrix, silent)),
                    f"{matrix.name} matters with {down.name} at zero",
                )
                unchanged = _same_logits(specimen, specimen.unbiased, _scaled(matrix, specimen.unbiased))
                _require(not unchanged, f"{matrix.name} never matters")


def experts_read_their_site(specimen: Specimen) -> None:
    """An expert reads the direction of its block's input: without it, gate and up put out nothing."""
    for router, matrices in specimen.experts():
        block = specimen.site(router.layer, "mlp_input")
        a, expert = specimen.run(specimen.unbiased).inputs[block], matrices["down"].expert
        rows = torch.zeros_like(router.of(specimen.params))
        rows[expert] = a[0]
        params = router.replaced(specimen.unbiased, rows)
        direction = _directions(a[:1])
        for kind in matrices.keys() - {"down"}:
            w = matrices[kind].of(params)
            params = matrices[kind].replaced(params, w - (w @ direction.T) @ direction)
        silent = specimen.run(_zero(matrices["down"], params)).outputs[block]
        added = specimen.run(params).outputs[block] - silent
        _require(
            _close(added[0], torch.zeros_like(added[0])) and bool((added.abs() > MOVED).any()),
            f"{matrices['up'].name} and its gate read another vector than the input of {block}",
        )


def parallel_layers_read_one_stream(specimen: Specimen) -> None:
    """The MLP reads the outputs of its layer's attention and mixer, except where the map is parallel."""
    with_mlp = {site.layer for site in specimen.architecture.sites if site.name == "mlp_input"}
    writes = (m for m in specimen.architecture.matrices if m.role == "write" and m.block != "mlp")
    for o in (matrix for matrix in writes if matrix.layer in with_mlp):
        site = specimen.site(o.layer, "mlp_input")
        after = specimen.run(changes={o.module: lambda output: output.roll(1, -1)})
        apart = _close(after.inputs[site], specimen.flow.inputs[site])
        says = "does not read" if apart else "reads"
        _require(
            apart == specimen.architecture.parallel,
            f"the MLP of layer {o.layer} {says} the output of {o.name}, and parallel is"
            f" {specimen.architecture.parallel} in the map",
        )


def norms_have_their_gain(specimen: Specimen) -> None:
    """The output of a norm of the map is its gain times its output at a gain of one, and its bias."""
    architecture = specimen.architecture
    norms = {architecture.final_norm, *(m.norm for m in architecture.matrices if m.norm is not None)}
    for norm in sorted(norms, key=lambda norm: norm.parameter):
        path = norm.parameter.removesuffix(".weight")
        ones = torch.full_like(specimen.params[norm.parameter], 1 - norm.offset)
        plain = {"weight": ones, "bias": torch.zeros_like(ones)}
        at_one = functional_call(specimen.network.get_submodule(path), plain, (specimen.flow.inputs[path],))
        expected = norm.gain(specimen.params) * at_one + _bias(specimen, path)
        _require(
            _close(specimen.flow.outputs[path], expected),
            f"the gain of {path} is not its weight plus {norm.offset:g}",
        )


def logits_are_unembedded(specimen: Specimen) -> None:
    """The logits are the unembedding of the output of the final norm, before any cap."""
    architecture, flow = specimen.architecture, specimen.flow
    final, head = (
        name.removesuffix(".weight") for name in (architecture.final_norm.parameter, architecture.unembed)
    )
    _require(
        _close(flow.inputs[head], flow.outputs[final]), f"{head} has another input than the output of {final}"
    )
    unembedding = architecture.unembedding(specimen.params)
    expected = flow.outputs[final] @ unembedding.T + _bias(specimen, head)
    _require(_close(flow.outputs[head], expected), f"{head} does not apply the unembedding of the map")


def tying_is_the_networks(specimen: Specimen) -> None:
    """The map says that the unembedding is the embedding exactly where the network ties them."""
    head, embedding = specimen.network.get_output_embeddings(), specimen.network.get_input_embeddings()
    tied = head.weight is embedding.weight  # pyright: ignore[reportOptionalMemberAccess]
    mapped = specimen.architecture.tied
    _require(tied == mapped, f"tied is {mapped} in the map and {tied} in the network")


def tokens_have_their_rows(specimen: Specimen) -> None:
    """The embedding of a token is its row of the map's embedding, up to one factor for all."""
    name = specimen.architecture.embed
    rows = specimen.params[name][TOKENS[0]]
    actual = specimen.flow.outputs[name.removesuffix(".weight")]
    factor = (actual * rows).sum() / rows.square().sum()
    _require(_close(actual, factor * rows), f"the embeddings are not the rows of {name}")


def checkpoints_have_the_names(specimen: Specimen) -> None:
    """A saved checkpoint, with or without its head, opens under the names of the map."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    unembed = specimen.architecture.unembed
    headless = {name: parameter for name, parameter in specimen.params.items() if name != unembed}
    headless.pop(unembed.replace(".weight", ".bias"), None)
    buffers = {name for name, _ in specimen.network.named_buffers()}  # stored as well by some
    headless_network: Any = specimen.network.get_submodule(specimen.architecture.embed.partition(".")[0])
    for network, expected in ((specimen.network, specimen.params), (headless_network, headless)):
        with TemporaryDirectory() as directory:
            network.save_pretrained(directory)
            stored = open_params(Path(directory), specimen.architecture)
            if unlike := (set(stored) - buffers) ^ set(expected):
                raise ValueError(f"{min(unlike)} is in the network or in its checkpoint, and not in both")
            unequal = [name for name in expected if not torch.equal(stored[name], expected[name])]
            _require(not unequal, f"the checkpoint has another tensor for {', '.join(unequal[:1])}")


INVARIANTS: tuple[Invariant, ...] = (
    parts_exist,
    sizes_agree,
    layers_are_complete,
    every_weight_is_mapped_once,
    modules_apply_their_matrices,
    inputs_are_at_their_site,
    queries_act_at_their_token_and_head,
    keys_act_on_later_tokens_of_their_group,
    values_act_linearly_on_their_group,
    gates_act_at_their_unit,
    keys_act_through_queries,
    values_act_through_o,
    latents_carry_keys_and_values,
    inner_matrices_lie_between,
    writes_reach_the_stream,
    hidden_units_stay_apart,
    gates_act_through_up,
    mixers_act_in_their_time_and_heads,
    mixer_units_stay_apart,
    decays_act_on_the_past,
    experts_are_their_own,
    shared_routers_weight_the_shared_expert,
    experts_read_their_site,
    parallel_layers_read_one_stream,
    norms_have_their_gain,
    logits_are_unembedded,
    tying_is_the_networks,
    tokens_have_their_rows,
    checkpoints_have_the_names,
)


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise ValueError(sentence)


def _close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def _bias(specimen: Specimen, module: str) -> Float[Tensor, " d_out"]:
    """The bias of a module, zero where it has none."""
    bias = specimen.params.get(f"{module}.bias")
    return torch.zeros(specimen.flow.outputs[module].shape[1], dtype=torch.float64) if bias is None else bias


def _directions(rows: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
    return nn.functional.normalize(rows, dim=1)


def _mlps(specimen: Specimen) -> Iterator[tuple[ResidualMatrix, list[ResidualMatrix], str]]:
    """Every MLP, shared experts among them: its up, its gate if it has one, and the module of its down."""
    for gate, up, down in MLPS:
        for matrix in specimen.of_kind(up):
            gates = [candidate for candidate in specimen.of_kind(gate) if candidate.layer == matrix.layer]
            yield matrix, gates, specimen.matrix(matrix.layer, down).module


def _zero(matrix: ResidualMatrix, params: Params) -> Params:
    return matrix.replaced(params, torch.zeros_like(matrix.of(params)))


def _scaled(matrix: ResidualMatrix, params: Params) -> Params:
    return matrix.replaced(params, -2 * matrix.of(params))


def _same_logits(specimen: Specimen, params: Params, others: Params) -> bool:
    return _close(specimen.run(others).logits, specimen.run(params).logits)


def _places(matrix: ResidualMatrix, params: Params) -> Int[Tensor, " d_out"]:
    """The entries of a module's output that are the matrix's."""
    size = params[matrix.parameter].shape[1 if matrix.transposed else 0]
    rows = ResidualMatrix(matrix.layer, matrix.kind, "places", rows=matrix.rows)
    return rows.of({"places.weight": torch.arange(float(size))[:, None]})[:, 0].long()


def _heads(matrix: ResidualMatrix, params: Params) -> Int[Tensor, "head d_head"]:
    """The entries of a module's output that are the matrix's, by head."""
    return _places(matrix, params).unflatten(0, (matrix.heads, -1))


def _rolled(places: Int[Tensor, " d"], output: Float[Tensor, "row d_out"]) -> Float[Tensor, "row d_out"]:
    """Entries at `TOKEN` change places, which a norm of them does not undo, nor spread to other entries."""
    output = output.clone()
    output[TOKEN, places] = output[TOKEN, places].roll(1)
    return output


def _shifted(
    places: Int[Tensor, " d"], by: float, tokens: int | slice, output: Float[Tensor, "row d_out"]
) -> Float[Tensor, "row d_out"]:
    output = output.clone()
    output[tokens, places] += by
    return output


def _moved(specimen: Specimen, matrix: ResidualMatrix, change: Change) -> Bool[Tensor, "token head"]:
    """Where the input of o changes with the output of a matrix of its layer."""
    o = specimen.matrix(matrix.layer, "o")
    return _changed(specimen.flow, specimen.run(changes={matrix.module: change}), o)


def _changed(flow: Flow, other: Flow, o: ResidualMatrix) -> Bool[Tensor, "token head"]:
    """Where the inputs of o's module differ, by the heads of o; a row may be a head already."""
    difference = (other.inputs[o.module] - flow.inputs[o.module]).reshape(len(TOKENS[0]), o.heads, -1)
    return difference.abs().amax(-1) > MOVED


def _mixer(specimen: Specimen, layer: int) -> tuple[ResidualMatrix, str]:
    """The matrix with which the mixer of a layer writes, and the module that takes in the mixed values.

    That is the norm of the mixer's output, or the matrix's own module where there is none.
    """
    o = next(
        m for m in specimen.architecture.matrices if (m.layer, m.block, m.role) == (layer, "mixer", "write")
    )
    norm = f"{o.module.rpartition('.')[0]}.norm"
    return o, norm if norm in specimen.flow.inputs else o.module


def _kernel(specimen: Specimen, o: ResidualMatrix) -> int:
    """The tokens that the convolution of a mixer spans."""
    modules = specimen.network.get_submodule(o.module.rpartition(".")[0]).modules()
    return next(module.kernel_size[0] for module in modules if isinstance(module, nn.Conv1d))


def _is_by_channel(specimen: Specimen, name: str) -> bool:
    """Whether a parameter is the kernels of a convolution that mixes no channels."""
    if specimen.params[name].ndim != 3:
        return False
    module = specimen.network.get_submodule(name.rpartition(".")[0])
    return isinstance(module, nn.Conv1d) and module.groups == module.in_channels


def _some(units: int) -> tuple[int, int, int]:
    return 0, units // 2, units - 1


def _is_of_group(moved: Bool[Tensor, "token head"], group: int, groups: int) -> bool:
    """Whether the query heads of one key-value group have changed, from `TOKEN` on."""
    share = moved.shape[1] // groups
    heads = moved.any(0).nonzero()[:, 0].tolist()
    before, later = moved[:TOKEN].any(), moved[TOKEN + 1 :].any()
    return heads == [*range(group * share, (group + 1) * share)] and not before and bool(later)


def _in_words(matrix: ResidualMatrix, head: int, moved: Bool[Tensor, "token head"]) -> str:
    tokens, heads = (moved.any(dim).nonzero()[:, 0].tolist() for dim in (1, 0))
    return (
        f"head {head} of {matrix.name}, changed at token {TOKEN}, changes the attention output at the tokens"
        f" {tokens} and the heads {heads}"
    )


def _is_linear(specimen: Specimen, module: str, places: Int[Tensor, " d"], into: str) -> bool:
    """Whether the input of a module doubles its change with that of another one's output."""
    once, twice = (
        specimen.run(changes={module: partial(_shifted, places, by, TOKEN)}).inputs[into]
        - specimen.flow.inputs[into]
        for by in (1.0, 2.0)
    )
    return _close(twice, 2 * once)

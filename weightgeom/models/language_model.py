"""Language models whose weights are data: a base, a checkpoint and an edit are three values of `params`."""

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightgeom.models.adapters import open_checkpoint
from weightgeom.models.experts import stacked
from weightgeom.models.residual import Architecture
from weightgeom.models.weights import Untied
from weightgeom.params import Params
from weightgeom.text.tokens import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A network of one architecture with its tokenizer; its weights are given at every call.

    The network's own weights do not matter, and from `load` it has none. It computes on `device`.
    """

    network: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    architecture: Architecture
    device: torch.device = CPU

    def params(self, directory: Path, base: Params | None = None) -> Params:
        """The weights of a checkpoint, read lazily; those of an adapter are `base` and its low-rank update.

        Raises:
            FileNotFoundError: if there is no safetensors checkpoint in `directory`.
            ValueError: if one of its files is truncated or corrupt, or an adapter does not fit `base`.
        """
        return open_checkpoint(directory, self.architecture, base)

    def hold(self, params: Params, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The weights in memory, on the model's device, as `logits` wants them for many batches.

        The unembedding of a tied network is among them if it is not the embedding.
        """
        names = {name for name, _ in self.network.named_parameters()} | kept_buffers(self.network)
        embed, unembed = self.architecture.embed, self.architecture.unembed
        if unembed in params and unembed not in names and not _equal(params[unembed], params[embed]):
            names.add(unembed)
        params = stacked(params, self.architecture.stacks)
        return {name: params[name].to(self.device, dtype) for name in params if name in names}

    @property
    def size(self) -> int:
        """The bytes of its weights in fp32."""
        return 4 * sum(parameter.numel() for parameter in self.network.parameters())

    def with_weights(self, params: Params, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
        """A network of its own that has `params` for weights, for code that patches or trains a network.

        Weights that are in memory, in this `dtype` and on the device, are shared and not copied.
        """
        config, held = self.network.config, self.hold(params, dtype)
        if self.architecture.tied and self.architecture.unembed in held:
            config = deepcopy(config)
            config.tie_word_embeddings = False
        network = _without_weights(config, self.device)
        network.load_state_dict(held, strict=False, assign=True)
        network.tie_weights()
        return network

    def streaming(self, params: Params) -> "LanguageModel":
        """This model, to be called without weights: each module takes its own from `params` when it runs.

        They are dropped when it has run, so that no more than one module's are held, in fp32.
        """
        from accelerate.hooks import attach_align_device_hook, remove_hook_from_module

        network = _without_weights(self.network.config, self.device)
        buffers = {name: params[name] for name in kept_buffers(network) if name in params}
        network.load_state_dict(buffers, strict=False)  # the hook leaves buffers where they are
        weights = Untied(stacked(params, self.architecture.stacks), self.architecture)
        attach_align_device_hook(network, self.device, offload=True, weights_map=weights)
        embedding = network.get_input_embeddings()
        remove_hook_from_module(embedding)
        _read_when_called(embedding, weights, self.architecture.embed, self.device)
        return replace(self, network=network)

    @torch.no_grad()
    def logits(
        self, params: Params, batch: Batch, keep: int = 0
    ) -> Float[Tensor, "sequence kept vocabulary"]:
        """Logits at the last `keep` positions (0: all) of a network that has `params` for weights."""
        return torch.func.functional_call(
            self.network,
            dict(params),
            tie_weights=self.architecture.unembed not in params,
            kwargs={
                "input_ids": batch.input_ids,
                "attention_mask": batch.attention_mask,
                "position_ids": batch.positions(),
                "use_cache": False,
                "logits_to_keep": keep,
            },
        ).logits

    def log_probs(self, params: Params, batch: Batch) -> Float[Tensor, "sequence predicted"]:
        """Log-probability (nats) of every token but the first, given those before it; 0 at non-targets."""
        logits = self.logits(params, batch)[:, :-1].float()
        picked = logits.gather(-1, batch.input_ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        return torch.where(batch.target[:, 1:], picked, 0.0)


def _read_when_called(embedding: nn.Module, weights: Params, name: str, device: torch.device) -> None:
    """Give an embedding, which is mutated, the rows of its weight that a call reads, for its time alone.

    Llama 4 moves the tokens to where the weight is: between calls that has to be the device as well.
    """
    shape = weights[name].shape
    stand_in = torch.zeros((), device=device).expand(shape)  # takes no memory

    def held(weight: Tensor) -> None:
        embedding.weight = nn.Parameter(weight, requires_grad=False)

    held(stand_in)

    def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids, *others = inputs
        used, places = ids.unique(return_inverse=True)
        held(weights[name][used.cpu()].to(device, stand_in.dtype))
        return places, *others

    embedding.register_forward_pre_hook(read)
    embedding.register_forward_hook(lambda *_: held(stand_in))


def kept_buffers(network: nn.Module) -> set[str]:
    """The buffers that checkpoints hold, such as DeepSeek's router biases, which no gradient trains."""
    return {name for name, _ in network.named_buffers()} & network.state_dict().keys()


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def _without_weights(config: "PreTrainedConfig", device: torch.device) -> "PreTrainedModel":
    """The network of a config in evaluation mode, its buffers on `device` and its parameters nowhere."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        network = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trusted(config.name_or_path or "")
        )
    network.tie_weights()
    name_body(network)
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return network.requires_grad_(False).eval()


def name_body(network: "PreTrainedModel") -> None:
    """Give a network, which is mutated, the name by which transformers, PEFT and TRL look for its body.

    The text model of Llama 4 has it as `model` and says `language_model`.
    """
    if network.base_model is network:
        network.base_model_prefix = "model"


_trusted: set[str] = set()


def trust(directory: Path) -> None:
    """Let the code that lies in a checkpoint's directory run in this process; remembers it."""
    _trusted.add(str(directory))


def trusted(directory: Path | str) -> bool:
    """Whether the code in a checkpoint's directory may run."""
    return str(directory) in _trusted

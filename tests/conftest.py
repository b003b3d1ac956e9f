import os
import signal
from pathlib import Path

import networks
import pytest
import torch
from hypothesis import settings
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from weightgeom.data.world import World
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of
from weightgeom.text.examples import Examples

torch.set_num_threads(1)  # the networks are too small for more
os.environ["OMP_NUM_THREADS"] = "1"  # in processes of their own as well: threads that wait keep a core busy
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # behind a shell's `&`, and in all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("shared machine", deadline=None, max_examples=50)
settings.load_profile("shared machine")

# Files that start processes, servers or a cluster, and mostly wait for them, then those that train or measure
# networks dozens of times. The longest come first, so that they wait while other workers compute.
SLOW = (
    "slurm/test_interruptions.py",
    "slurm/test_sweeps_under_slurm.py",
    "slurm/test_arrays.py",
    "test_run.py",
    "test_readme.py",
    "runners/launcher/test_local_sweeps.py",
    "test_tools.py",
    "runners/planning/test_plan.py",
    "test_own_code.py",
    "runners/cli/test_wheel.py",
    "test_extensions.py",
    "runners/tracking/test_outages.py",
    "bases/test_chain.py",
    "training/test_resuming.py",
    "training/test_lora.py",
    "runners/tracking/test_browser.py",
    "runners/tracking/test_server.py",
    "runners/tracking/test_publisher.py",
    "runners/report/test_report.py",
    "test_bad_input.py",
    "test_library_and_pair.py",
    "bases/test_hub.py",
    "data/test_hub_data.py",
    "runners/launcher/test_jobs.py",
    "probes/test_moments_probe.py",
    "objectives/test_graded_contrastive.py",
    "interventions/test_surgery.py",
    "interventions/test_rank1.py",
    "objectives/test_dpo.py",
    "probes/test_rsf_evidence.py",
    "probes/test_uncertainty_probe.py",
    "runners/summary/test_terminal.py",
    "runners/summary/test_sweep.py",
    "figures/test_causal.py",
    "uncertainty/test_rows.py",
    "training/test_matching.py",
)
# Of tests on the network of every architecture, the quick ones take these alone: a fused and a grouped one,
# one with experts and one with linear attention.
QUICK_NETWORKS = {"gpt_neox", "llama", "mixtral", "qwen3_next"}
OTHER_NETWORKS = (networks.CONFIGS | networks.MIXTURES).keys() - QUICK_NETWORKS


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the files of `SLOW`, which come first, in their order, and further networks as slow."""
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(SLOW)}
    for item in items:
        if item.path in places or on_other_network(item):
            item.add_marker("slow")
    items.sort(key=lambda item: places.get(item.path, len(places)))


def on_other_network(item: pytest.Item) -> bool:
    """Whether a test is parametrised by one of `OTHER_NETWORKS`."""
    callspec = getattr(item, "callspec", None)  # only parametrised tests have one
    given = () if callspec is None else callspec.params.values()
    return any(isinstance(value, str) and value in OTHER_NETWORKS for value in given)


class Scheduling(LoadFileScheduling):
    """A file is one worker's; so is all that shares the SLURM, which is more than enough for one machine."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "tests/slurm" if file.startswith("tests/slurm/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def world() -> World:
    return World(entities=20, heldout_entities=4, values=5, documents=20, pairs=20, heldout=6)


@pytest.fixture(scope="session")
def examples(world: World) -> Examples:
    return world.examples()


@pytest.fixture(scope="session")
def tokenizer(world: World) -> PreTrainedTokenizerFast:
    return world.tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    """A small random GPT-NeoX whose norms have gains; nobody mutates it."""
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=1,
    )
    network = GPTNeoXForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) / 4
        parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return LanguageModel(network, tokenizer, architecture_of(config))


@pytest.fixture
def params(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The weights of `model`, a copy."""
    return {name: parameter.clone() for name, parameter in model.network.named_parameters()}

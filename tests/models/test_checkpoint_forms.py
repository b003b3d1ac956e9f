"""However a pair of checkpoints is stored, its fractions are those of the models in memory."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import small
import torch
from networks import CONFIGS, MIXTURES
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from weightgeom.estimators.reference_subspaces import Inputs, input_frames, prediction_frame, routed_place_of
from weightgeom.geometry.subspace import Subspace
from weightgeom.interfaces import Setting
from weightgeom.models.loading import load
from weightgeom.models.residual import ResidualMatrix
from weightgeom.params import Params
from weightgeom.probes.rsf import RSF
from weightgeom.table import Row

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
EXAMPLES = small.WORLD.examples()
TOKENIZER = small.WORLD.tokenizer()
K = 4
ALL = CONFIGS | MIXTURES


def saved(name: str, directory: Path, dtype: torch.dtype, moved: bool) -> Path:
    """A checkpoint in shards of a few kilobytes; `moved` by a tenth of what its weights are."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(ALL[name](len(TOKENIZER), 128))
    for parameter in (parameter for parameter in network.parameters() if parameter.numel() > 1):
        parameter.data += 0.1 * moved * parameter.std() * torch.randn(parameter.shape)
    network.to(dtype).save_pretrained(directory, max_shard_size="15KB")
    TOKENIZER.save_pretrained(directory)
    return directory


def measured(before: Path, after: Path) -> list[Row]:
    """The probe's rows for two directories, read lazily."""
    model = load(before, "cpu")
    start = model.params(before)
    end = model.params(after, start)
    return RSF(k=K, resamples=0, tokens=256).measurement(Setting(model, start, end, False, EXAMPLES, 0))(end)


def fractions(rows: Sequence[Row]) -> dict[str, float]:
    """The fraction in its own subspace, by matrix."""
    return {
        ResidualMatrix(row["layer"], row["matrix"], "", expert=row.get("expert")).name: row["value"]
        for row in rows
        if row["quantity"] == "fraction" and row["subspace"] != "random"
    }


def by_definition(directory: Path, before: Params, after: Params) -> dict[str, float]:
    """‖dW U‖² / ‖dW‖² or ‖Uᵀ dW‖² / ‖dW‖² of two models that are whole in memory, in fp64."""
    model = load(directory, "cpu")
    setting = Setting(model, before, after, False, EXAMPLES, 0)
    inputs = Inputs(tokens=256, experts=True)
    frames = [*input_frames(setting, before, K, inputs), prediction_frame(setting, before, K)]
    spaces: dict[object, Subspace] = {frame.place: frame.space for frame in frames}
    ratios = {}
    for matrix in model.architecture.matrices:
        delta = matrix.written(after).double() - matrix.written(before).double()
        place = routed_place_of(matrix)
        if place not in spaces:  # an expert that gets no token
            continue
        basis = spaces[place].basis.double()
        inside = delta @ basis if matrix.role == "read" else basis.T @ delta
        ratios[matrix.name] = float(inside.square().sum() / delta.square().sum())
    return ratios


def loaded(directory: Path) -> dict[str, torch.Tensor]:
    """The weights as transformers itself loads them, in fp32."""
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return unstacked(weights, network.config.model_type)


def unstacked(weights: dict[str, torch.Tensor], model_type: str) -> dict[str, torch.Tensor]:
    """Weights with the matrices of experts apart, whose rows alternate in gpt-oss alone."""
    stacks = {name for name, weight in weights.items() if weight.ndim == 3 and ".experts." in name}
    apart = {name: weight for name, weight in weights.items() if name not in stacks}
    for name, stack in weights.items():
        for expert, of_expert in enumerate(stack if name in stacks else ()):
            experts, _, last = name.rpartition(".")
            kinds = last.removesuffix("_proj").split("_")
            rows = of_expert.T if model_type in ("gpt_oss", "llama4_text") else of_expert
            every = len(kinds)
            parts = (
                [rows[place::every] for place in range(every)]
                if model_type == "gpt_oss"
                else rows.chunk(every)
            )
            for kind, part in zip(kinds, parts, strict=True):
                apart[f"{experts}.{expert}.{kind}_proj.weight"] = part
    return apart


@pytest.mark.parametrize("name", ALL)
def test_a_sharded_lazily_read_bf16_pair_has_the_fractions_of_two_loaded_fp32_models(name, tmp_path):
    before = saved(name, tmp_path / "before", torch.bfloat16, moved=False)
    after = saved(name, tmp_path / "after", torch.bfloat16, moved=True)
    assert len([*before.glob("model-*.safetensors")]) > 2
    expected = by_definition(before, loaded(before), loaded(after))
    assert fractions(measured(before, after)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_two_dtypes_are_compared_in_fp32(dtypes, tmp_path):
    before = saved("llama", tmp_path / "before", dtypes[0], moved=False)
    after = saved("llama", tmp_path / "after", dtypes[1], moved=True)
    expected = by_definition(before, loaded(before), loaded(after))
    assert fractions(measured(before, after)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "name, modules", [("llama", ["q_proj", "o_proj", "down_proj"]), ("gpt2", ["c_attn"])]
)
def test_lora_factors_have_the_fractions_of_the_delta_that_they_multiply_out_to(name, modules, tmp_path):
    before = saved(name, tmp_path / "before", torch.float32, moved=False)
    config = LoraConfig(r=3, lora_alpha=8, target_modules=modules, fan_in_fan_out=name == "gpt2")
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(before), config)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in network.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    network.save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(before), tmp_path / "adapter")
    weights = {key: weight.detach() for key, weight in merged.merge_and_unload().named_parameters()}  # pyright: ignore
    expected = by_definition(before, loaded(before), weights)
    factored = fractions(measured(before, tmp_path / "adapter"))
    assert factored and factored == pytest.approx({key: expected[key] for key in factored}, abs=1e-6)

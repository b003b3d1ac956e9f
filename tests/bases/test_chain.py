"""Chains of stages: what is refused, what is compared with what, and one from end to end."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import pytest
import small
import torch
from app import SMALL, WORLD, Ended, done, run
from mlflow import MlflowClient
from networks import save
from pandas.testing import assert_frame_equal
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from stages import made
from transformers import AutoModelForCausalLM

from runners.report.__main__ import main as make_report
from weightgeom.bases.chain import Chain
from weightgeom.bases.hub import identity
from weightgeom.bases.pretrained import Pretrained, TwoCheckpoints
from weightgeom.data.world import World
from weightgeom.estimators.reference_subspaces import Inputs, input_frames, prediction_frame
from weightgeom.interfaces import Setting
from weightgeom.models.loading import load
from weightgeom.probes.rsf import RSF
from weightgeom.trajectory import Base

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # PEFT asks for it
)
EXAMPLES = small.WORLD.examples()
COMMITS = {"base": "a" * 40, "sft": "b" * 40, "dpo": "c" * 40}


def no_stage(name: str, specification: Mapping[str, object], work: Callable, steps: int) -> Path:
    raise AssertionError("nothing is made")


def prepared(chain: Chain) -> Base:
    return chain.prepare(no_stage, EXAMPLES, small.WORLD, "cpu")


def saved(home: Path, *names: str, dtype: str = "float32") -> dict[str, str]:
    return {name: str(save("llama", home / name, seed, dtype)) for seed, name in enumerate(names)}


def test_every_stage_is_compared_with_the_base_and_with_the_stage_before(tmp_path):
    stages = saved(tmp_path, "base", "sft", "dpo")
    chain = Chain(stages)
    assert chain.check(longest=None).n_layers == 2
    base = prepared(chain)
    assert base.trajectory is not None and base.trajectory.stages == ("base", "sft", "dpo")
    assert [str(path) for path in base.trajectory.steps.values()] == list(stages.values())
    assert base.directory == tmp_path / "base" and not base.trajectory.from_random
    pairs = [TwoCheckpoints(stages["base"], stages["sft"]), TwoCheckpoints(stages["sft"], stages["dpo"])]
    assert list(base.pairs) == [pair.prepare(no_stage, EXAMPLES, small.WORLD, "cpu") for pair in pairs]
    other = prepared(Chain({name: stages[name] for name in ("base", "dpo", "sft")}))
    assert other.identity != base.identity  # the order matters


def test_the_check_needs_only_configs(tmp_path):
    stages = saved(tmp_path, "base", "sft")
    (tmp_path / "sft/model.safetensors").unlink()
    assert Chain(stages).check(None).d_model == 32
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        prepared(Chain(stages))


def test_stages_may_differ_in_dtype_and_in_their_number_of_embeddings(tmp_path, caplog):
    stages = saved(tmp_path, "base", "sft")
    stages |= saved(tmp_path, "dpo", dtype="bfloat16")
    network = AutoModelForCausalLM.from_pretrained(stages["sft"])
    network.resize_token_embeddings(network.config.vocab_size + 3, mean_resizing=False)
    network.save_pretrained(stages["sft"])
    with caplog.at_level(logging.WARNING):
        Chain(stages).check(None)
        base = prepared(Chain(stages))
    assert "the 3 that it lacks are taken as unmoved" in caplog.text  # of dpo compared with sft
    with pytest.raises(ValueError, match=r"model\.tokenizer=dpo must have the vocabulary of every stage but"):
        prepared(Chain(stages, tokenizer="dpo"))
    pair_messages = load(base.pairs[1].directory, "cpu")
    assert pair_messages.network.config.vocab_size == network.config.vocab_size


def test_all_comparisons_can_have_the_tokenizer_of_one_stage(tmp_path):
    stages = saved(tmp_path, "base", "sft", "dpo")
    base, own = prepared(Chain(stages, tokenizer="sft")), prepared(Chain(stages))
    assert {prepared_base.directory.name for prepared_base in (base, *base.pairs)} == {"sft"}
    assert [prepared_base.directory.name for prepared_base in (own, *own.pairs)] == ["base", "base", "sft"]
    assert base.identity != own.identity and base.pairs[0].identity != own.pairs[0].identity
    assert base.pairs[1] == own.pairs[1]  # in which sft is what dpo is compared with


def test_the_size_and_the_revision_go_into_the_name():
    chain = Chain({"base": "lab/m-{size}", "sft": "lab/m{size}-sft@v2"}, {"base": "v1", "sft": "v1"}, "70m")
    assert chain.locations() == {"base": "lab/m-70m@v1", "sft": "lab/m70m-sft@v2"}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({}, r"model\.stages must name two or more stages, such as \{base: A, sft: B, dpo: C\}, got none"),
        ({"base": "a"}, r"model\.stages must name two or more stages, .* got \['base'\]"),
        ({"sft": "a", "SFT": "b"}, r"model\.stages has names that differ only in case, sft, SFT"),
        (
            {"base": "a", "my sft": "b"},
            r"the invalid name 'my sft': use letters, digits and any of",
        ),
        ({"base": "a", "../sft": "b"}, r"the invalid name '\.\./sft': use letters"),
    ],
)
def test_malformed_chains_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        Chain(stages)


def test_a_tokenizer_of_no_stage_is_refused():
    with pytest.raises(ValueError, match=r"unknown stage model\.tokenizer=rlvr; choose from a, b"):
        Chain({"a": "lab/a", "b": "lab/b"}, tokenizer="rlvr")


def test_a_start_of_no_stage_and_a_tokenizer_of_another_stage_are_refused():
    with pytest.raises(ValueError, match=r"unknown stage model\.from=rlvr; choose from a, b"):
        Chain({"a": "lab/a", "b": "lab/b"}, from_="rlvr")
    with pytest.raises(ValueError, match=r"model\.tokenizer=a is for comparisons, and model\.from=b starts"):
        Chain({"a": "lab/a", "b": "lab/b"}, tokenizer="a", from_="b")


def test_a_stage_to_start_from_is_that_checkpoint_alone(tmp_path):
    stages = saved(tmp_path, "base", "sft", "dpo")
    base = prepared(Chain(stages | {"base": "lab/unpinned"}, from_="sft"))  # of the others nothing is needed
    assert base == Pretrained(stages["sft"]).prepare(no_stage, EXAMPLES, small.WORLD, "cpu")
    assert base.trajectory is None and base.pairs == ()
    assert base.identity != prepared(Chain(stages, from_="dpo")).identity
    assert Chain(stages, from_="dpo").check(longest=16).n_layers == 2
    with pytest.raises(ValueError, match=r"max_length is 4096 tokens and the model takes"):
        Chain(stages, from_="dpo").check(longest=4096)
    outline = Chain(stages, from_="sft").outline(EXAMPLES, small.WORLD)
    assert outline.locations == {0: stages["sft"]} and not outline.steps and not outline.pairs


def test_a_name_of_the_hub_needs_a_revision_that_does_not_move():
    with pytest.raises(
        ValueError,
        match=r"model\.stages\.b=lab/b is neither .* nor a pinned hub name: set model\.revisions\.b=",
    ):
        Chain({"a": "lab/a@v1", "b": "lab/b"}).locations()
    with pytest.raises(
        ValueError, match=r"model\.revisions\.b=main is a moving branch: set model\.revisions\.b=COMMIT"
    ):
        Chain({"a": "lab/a@v1", "b": "lab/b@main"}).locations()


def test_stages_that_cannot_be_compared_are_refused(tmp_path):
    stages = saved(tmp_path, "base", "sft")
    with pytest.raises(
        ValueError,
        match=r"model=chain/\.\.\. compares finished stages: set objective=none, or model\.from=STAGE"
        " to train from one of base, sft",
    ):
        Chain(stages).check(longest=8)
    with pytest.raises(
        FileNotFoundError, match=r"in model\.stages\.dpo: no directory \./nowhere: give a checkpoint"
    ):
        Chain(stages | {"dpo": "./nowhere"}).check(None)
    with pytest.raises(
        ValueError, match=r"model\.stages\.dpo and model\.stages\.sft are the same checkpoint"
    ):
        Chain(stages | {"dpo": stages["sft"]}).check(None)
    with pytest.raises(ValueError, match=r"dpo=.*/neox differs in architecture from model\.stages\.base="):
        Chain(stages | {"dpo": str(save("gpt_neox", tmp_path / "neox"))}).check(None)


def test_a_stage_of_another_shape_or_an_adapter_is_refused(tmp_path):
    stages = saved(tmp_path, "base", "sft")
    weights = load_file(f"{stages['sft']}/model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(8, 32)
    save_file(weights, f"{stages['sft']}/model.safetensors")
    with pytest.raises(
        ValueError, match=r"model\.stages\.sft=.* with stage base: .*up_proj\.weight is of shape \(8, 32\)"
    ):
        prepared(Chain(stages))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"model\.stages\.base=.* is an adapter, .* put its base before it"):
        Chain({"base": str(tmp_path / "adapter"), "sft": stages["base"]}).check(None)


def adapter_of(base: Path, directory: Path, seed: int = 5) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(directory))
    return directory


def test_a_stage_that_is_an_adapter_is_merged_into_the_one_before_it(tmp_path):
    stages = saved(tmp_path, "base", "dpo")
    adapter = adapter_of(tmp_path / "base", tmp_path / "adapter")
    stages = {"base": stages["base"], "sft": str(adapter), "dpo": stages["dpo"]}
    merges: list[Path] = []

    def stage(name: str, specification: Mapping[str, object], work: Callable, steps: int) -> Path:
        assert name == "merged" and set(specification) == {"adapter", "base"}
        merges.append(tmp_path / "merged")
        merges[0].mkdir()
        work(merges[0], lambda metrics, step: None)
        return merges[0]

    chain = Chain(stages)
    assert chain.check(longest=None).n_layers == 2
    base = chain.prepare(stage, EXAMPLES, small.WORLD, "cpu")
    assert base.trajectory is not None and len(merges) == 1
    assert list(base.trajectory.steps.values()) == [tmp_path / "base", merges[0], tmp_path / "dpo"]
    of_pairs = [pair.trajectory.steps for pair in base.pairs if pair.trajectory is not None]
    assert of_pairs == [{0: tmp_path / "base", 1: adapter}, {0: merges[0], 1: tmp_path / "dpo"}]
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = PeftModel.from_pretrained(network, str(adapter)).merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(merges[0]).state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.allclose(merged[name], weight, atol=1e-6) for name, weight in expected.items())


def test_an_adapter_to_start_from_is_merged_into_the_stage_before_it_and_no_other_is_needed(tmp_path):
    stages = saved(tmp_path, "base")
    stages = {
        "first": "lab/unpinned",
        **stages,
        "sft": str(adapter_of(tmp_path / "base", tmp_path / "sft")),
        "dpo": str(adapter_of(tmp_path / "base", tmp_path / "dpo", seed=6)),
    }
    base = Chain(stages, from_="dpo").prepare(made(tmp_path / "made"), EXAMPLES, small.WORLD, "cpu")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for name in ("sft", "dpo"):
        network = PeftModel.from_pretrained(network, stages[name]).merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(base.directory).state_dict()
    assert all(
        torch.allclose(merged[name], weight, atol=1e-6) for name, weight in network.state_dict().items()
    )
    assert Chain(stages, from_="dpo").check(longest=8).n_layers == 2
    outline = Chain(stages, from_="dpo").outline(EXAMPLES, small.WORLD)
    assert outline.locations == {0: stages["base"]}
    with pytest.raises(ValueError, match=r"model\.stages\.sft=.* is an adapter, .* put its base before it"):
        Chain({"sft": stages["sft"], "base": stages["base"]}, from_="sft").check(None)


def test_an_update_inside_the_subspace_of_the_stage_before_has_the_ratio_d_over_k(tmp_path):
    # dpo moves q and o of the first layer within what sft, and not the base, reads and predicts.
    stages = saved(tmp_path, "base", "sft")
    shutil.copytree(stages["sft"], tmp_path / "dpo")
    chain = Chain(stages | {"dpo": str(tmp_path / "dpo")})
    k, d = 4, 32
    probe = RSF(k=k, tokens=256, resamples=0)

    def setting(base: Base) -> Setting:
        model = load(base.directory, "cpu")
        assert base.trajectory is not None
        start = model.params(base.trajectory.steps[0])
        return Setting(model, start, start, from_random=False, examples=EXAMPLES, seed=0)

    of_sft = setting(prepared(chain).pairs[1])
    inputs = Inputs(tokens=256, length=probe.length, centre=False, groups=16, resamples=0)
    first = next(
        frame
        for frame in input_frames(of_sft, of_sft.start, k, inputs)
        if frame.place == ("attention_input", 0)
    )
    read, written = (
        first.space.basis[:, :k].float(),
        prediction_frame(of_sft, of_sft.start, k).space.basis[:, :k],
    )
    weights = load_file(tmp_path / "dpo/model.safetensors")
    generator = torch.Generator().manual_seed(1)
    weights["model.layers.0.self_attn.q_proj.weight"] += torch.randn(24, k, generator=generator) @ read.T
    weights["model.layers.0.self_attn.o_proj.weight"] += written.float() @ torch.randn(
        k, 24, generator=generator
    )
    save_file(weights, tmp_path / "dpo/model.safetensors")

    def ratios(base: Base, step: int) -> dict[str, float]:
        measured = setting(base)
        assert base.trajectory is not None
        rows = probe.measurement(measured)(measured.model.params(base.trajectory.steps[step]))
        rows = [row for row in rows if row["quantity"] == "ratio" and row["subspace"] != "random"]
        return {row["matrix"]: row["value"] for row in rows if row["layer"] == 0}

    base = prepared(chain)
    against_sft = ratios(base.pairs[1], 1)
    assert against_sft == pytest.approx({"q": d / k, "o": d / k}, rel=1e-4)
    against_base = ratios(base, 2)  # where all that sft did is in the update
    assert set(against_base) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert max(against_base.values()) < d / k - 1


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def stages(home: Path) -> dict[str, Path]:
    """A base, its SFT and the DPO of that, really trained, as the hub's cache lays them out."""
    tiny = [*(override for override in SMALL if not override.startswith("probe.")), *WORLD, "probe=[]"]
    assert (ended := run(home, *tiny, "objective=sft")).code == 0, ended.err
    (base,), (sft,) = (done(home / "outputs", kind) for kind in ("pretraining", "training"))
    hub = [override for override in tiny if not override.startswith(("model.", "+model."))]
    ended = run(home, *hub, "model=pythia", f"model.name={sft / 'step-2'}", "objective=dpo")
    assert ended.code == 0, ended.err
    (dpo,) = done(home / "outputs", "training") - {sft}
    snapshots = {}
    for name, source in {"base": base / "step-4", "sft": sft / "step-2", "dpo": dpo / "step-2"}.items():
        snapshots[name] = home / "hf/hub" / f"models--lab--tiny-{name}/snapshots" / COMMITS[name]
        shutil.copytree(source, snapshots[name])
    return snapshots


@pytest.fixture(scope="module")
def compared(home: Path, stages: dict[str, Path]) -> Ended:
    """The chain, named as on the hub, in one run."""
    named = ", ".join(f"{name}: lab/tiny-{name}@{commit}" for name, commit in COMMITS.items())
    probes = ["probe=[rsf,behaviour,spectrum,overlap]", "probe.rsf.tokens=512", "probe.behaviour.tokens=256"]
    return run(
        home, *WORLD, *probes, "model=chain/own", f"model.stages={{{named}}}", "objective=none", "device=cpu",
        "name=chain", HF_HOME=str(home / "hf"),
    )  # fmt: skip


def table(ended: Ended, name: str) -> pd.DataFrame:
    return pd.read_parquet(ended.record / f"artifacts/tables/{name}.parquet")


def test_a_chain_of_three_stages_is_one_comparison(home, compared):
    assert compared.code == 0, compared.err
    names = {path.name for path in (compared.record / "artifacts/tables").glob("*.parquet")}
    probes = ("rsf", "behaviour", "spectrum", "overlap")
    assert names == {
        "stages.parquet",
        *(f"{name}{end}.parquet" for name in probes for end in ("", "_stages")),
        *(f"rsf{which}_{end}.parquet" for which in ("", "_stages") for end in ("means", "parameters")),
    }
    figures = {path.name for path in (compared.record / "artifacts/figures").iterdir()}
    drawn = ("stages", "ratio_by_layer_sft", "ratio_by_layer_dpo", "stable_rank_by_layer")
    assert figures == {f"{name}.{ending}" for name in drawn for ending in ("png", "pdf")}
    rows = table(compared, "stages")
    pairs = list(rows[["stage", "against"]].drop_duplicates().itertuples(index=False, name=None))
    assert pairs == [("sft", "base"), ("dpo", "base"), ("dpo", "sft")]
    shown = [line.split("│")[1:3] for line in compared.out.splitlines() if line.startswith("│")]
    assert [
        (stage.strip(), other.strip()) for stage, other in shown if stage.strip() in ("sft", "dpo")
    ] == pairs
    client = MlflowClient(f"sqlite:///{home}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("chain")
    assert experiment is not None
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.data.tags["stages"] == "0 base, 1 sft, 2 dpo"
    assert tracked.data.params["model.stages.dpo"] == f"lab/tiny-dpo@{COMMITS['dpo']}"
    last = table(compared, "rsf_stages").query("step == 2 and matrix == 'q' and quantity == 'ratio'")
    mean = last[last["subspace"] != "random"]["value"].mean()
    assert tracked.data.metrics["rsf_stages/q"] == pytest.approx(mean)
    assert len(tracked.data.metrics) <= 50


def test_the_first_stage_has_the_same_numbers_against_the_base_and_against_the_one_before(compared):
    for name in ("rsf", "behaviour", "spectrum"):
        of_base, of_previous = (
            table(compared, name + end).query("step == 1").reset_index(drop=True) for end in ("", "_stages")
        )
        assert len(of_base)
        assert_frame_equal(of_base, of_previous, check_exact=True)
    assert set(table(compared, "rsf")["step"]) == {0, 1, 2}
    assert set(table(compared, "rsf_stages")["step"]) == {1, 2}


def test_a_stage_compared_with_the_one_before_gives_the_numbers_of_model_pair(home, stages, compared):
    pair = run(
        home, *WORLD, "probe.rsf.tokens=512", "probe.behaviour.tokens=256", "model=pair", "objective=none",
        f"model.before={stages['sft']}", f"model.after={stages['dpo']}", "device=cpu", "outputs=elsewhere",
    )  # fmt: skip
    assert pair.code == 0, pair.err
    for name in ("rsf", "behaviour"):
        ended = table(pair, name).query("step == 1").assign(step=2)
        mine = table(compared, f"{name}_stages").query("step == 2")
        assert_frame_equal(
            mine.reset_index(drop=True), ended.reset_index(drop=True), check_exact=True, check_like=True
        )


def test_the_report_shows_every_comparison_of_a_chain_and_none_as_pretraining(home, compared, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert make_report(["chain"]) == 0
    page = (home / "outputs/report/chain/index.html").read_text()
    assert all(name in page for name in ("base → sft", "base → dpo", "sft → dpo"))
    rows = pd.read_parquet("outputs/report/chain/tables/asymmetry.parquet")
    ratios = rows[rows["matrix"] == "q"].set_index("objective")["ratio"]
    means = table(compared, "stages").query("matrix == 'q' and quantity == 'ratio' and layer.isna()")
    assert ratios.to_dict() == pytest.approx({
        f"{against} → {stage}": value
        for stage, against, value in means[["stage", "against", "value"]].itertuples(index=False)
    })  # fmt: skip
    assert set(rows["trajectory"]) == {"training"}
    claims = pd.read_parquet("outputs/report/chain/tables/claims.parquet")
    assert set(claims["verdict"]) == {"not tested"}  # as nothing says how a stage was trained


def test_the_stages_of_a_chain_are_kept_with_their_order(compared):
    assert table(compared, "rsf").attrs["stages"] == ["base", "sft", "dpo"]
    params = json.loads((compared.record / "run.json").read_text())["params"]
    assert [key for key in params if key.startswith("model.stages.")] == [
        f"model.stages.{n}" for n in COMMITS
    ]


def test_an_objective_starts_from_a_stage_and_an_intervention_edits_it(home, stages):
    named = ", ".join(f"{name}: lab/tiny-{name}@{commit}" for name, commit in COMMITS.items())
    few = ["intervention=[rank1]", "intervention.rank1.matrices=[o]", "probe=[rsf]", "probe.rsf.tokens=256"]
    ended = run(
        home, *WORLD, *few, "model=chain/own", f"model.stages={{{named}}}", "model.from=dpo", "objective=dpo",
        "training.steps=2", "training.batch_size=4", "training.max_length=48", "probe.rsf.resamples=0",
        "device=cpu", "name=from", HF_HOME=str(home / "hf"),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    about = json.loads((ended.record / "run.json").read_text())
    assert about["params"]["model.from"] == "dpo"
    key = json.loads((done(home / "outputs", "rank1").pop() / "spec.json").read_text())
    assert key["base"] == identity(stages["dpo"])
    assert set(table(ended, "rank1")["matrix"]) == {"o"}
    # The update is that of the new training alone: 2 steps of at most 1e-3 of Adam, and a little decay.
    assert table(ended, "rsf").query("quantity == 'delta_norm' and step == 2")["value"].max() < 1


@pytest.fixture(scope="module")
def each_stage(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A run that measures every stage of random networks, and the moments of an objective at each."""
    home = tmp_path_factory.mktemp("each")
    tokenizer = World(documents=60, pairs=24, heldout=8, groups=("known", "impossible")).tokenizer()
    for seed, name in enumerate(COMMITS):
        small.network(tokenizer, seed).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    named = ", ".join(f"{name}: {home / name}" for name in COMMITS)
    few = ["prompts=16", "neighbours=4", "points=8", "permutations=1", "refits=0", "random=2", "resamples=2"]
    return run(
        home, *WORLD, "data.groups=[known,impossible]", "probe=[moments,uncertainty]",
        "+objective@probe.moments.objective=dpo", "probe.moments.tokens=256", "probe.moments.prompts=16",
        "probe.moments.resamples=0", *(f"probe.uncertainty.{key}" for key in few), "model=chain/own",
        f"model.stages={{{named}}}", "objective=none", "device=cpu", "name=each",
    )  # fmt: skip


def test_uncertainty_measures_every_stage_of_a_chain_by_itself(each_stage):
    assert each_stage.code == 0, each_stage.err
    rows = table(each_stage, "uncertainty")
    assert set(rows["step"]) == {0, 1, 2} and rows.attrs["stages"] == list(COMMITS)
    aurocs = rows[rows["quantity"] == "auroc_projection"].groupby("step")["value"].apply(list)
    assert aurocs[0] != aurocs[1] != aurocs[2]
    names = {path.stem for path in (each_stage.record / "artifacts/tables").glob("*.parquet")}
    assert "uncertainty_stages" not in names  # it compares nothing


def test_the_moments_of_an_objective_at_each_stage_are_compared_with_the_update_of_the_next(each_stage):
    moments, between = table(each_stage, "moments"), table(each_stage, "moments_stages")
    assert set(moments["step"]) == set(between["step"]) == {1, 2}

    def predicted(rows: pd.DataFrame, step: int) -> list[float]:
        return rows[(rows["step"] == step) & (rows["quantity"] == "predicted_ratio")]["value"].tolist()

    assert predicted(moments, 1) == predicted(moments, 2) == predicted(between, 1)  # all at the base
    assert predicted(between, 2) != predicted(between, 1)  # at sft
    assert set(moments["treatment"]) == {""}  # nothing says by what optimizer the stages were trained
    assert "sft after base" in each_stage.out and "dpo after sft" in each_stage.out


UNORDERED = ("stage1-step1413814", "stage2-step1000", "it-SFT", "10", "2-APO")


def test_a_chain_of_five_stages_has_the_order_of_its_list_and_one_may_be_an_adapter(tmp_path):
    cache = tmp_path / "hf/hub"
    places = {
        name: cache / f"models--lab--tiny/snapshots/{number:040x}" for number, name in enumerate(UNORDERED, 1)
    }
    for seed, (name, place) in enumerate(places.items()):
        if name == "it-SFT":
            adapter_of(places["stage2-step1000"], place)
        else:
            save("llama", place, seed)
    named = ", ".join(f"{name}: lab/tiny@{place.name}" for name, place in places.items())
    ended = run(
        tmp_path, *WORLD, "probe=[rsf]", "probe.rsf.tokens=256", "probe.rsf.resamples=0", "device=cpu",
        "model=chain/own", f"model.stages={{{named}}}", "objective=none", HF_HOME=str(tmp_path / "hf"),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    rows = table(ended, "stages")
    first, *later = UNORDERED
    assert list(dict.fromkeys(rows["stage"])) == later
    pairs = set(rows[["stage", "against"]].itertuples(index=False, name=None))
    assert pairs == {(name, first) for name in later} | set(zip(later[1:], later[:-1], strict=True))
    between = table(ended, "rsf_stages")
    ranks = between[between["quantity"] == "adapter_rank"]
    assert set(ranks["step"]) == {UNORDERED.index("it-SFT")} and set(ranks["value"]) == {3.0}
    moved = between[(between["quantity"] == "delta_norm") & (between["parameter"] == "")]
    moved = moved[moved["value"] > 0]
    assert set(moved.query("step == 2")["matrix"]) == {"q", "o"}
    assert set(moved.query("step == 3")["matrix"]) == {"q", "k", "v", "o", "gate", "up", "down"}
    figures = {path.stem for path in (ended.record / "artifacts/figures").glob("*.png")}
    assert figures == {"stages", *(f"ratio_by_layer_{name}" for name in later)}

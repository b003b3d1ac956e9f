from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from networks import language_model
from torch.testing import assert_close

from weightgeom.data.world import World
from weightgeom.estimators.hidden_states import Tail, last_states
from weightgeom.interfaces import Setting
from weightgeom.probes.uncertainty import Uncertainty
from weightgeom.text.examples import Question
from weightgeom.uncertainty import intrinsic_dimension as intrinsic

WORLD = World(
    groups=("known", "heldout", "impossible"),
    entities=40,
    heldout_entities=8,
    values=6,
    documents=20,
    pairs=20,
    heldout=6,
    group_size=24,
)
PROBE = Uncertainty(
    k=4, neighbours=5, points=10, thresholds=[0.1, 0.5], permutations=3, random=5, resamples=3, output=2,
    sensitivity_prompts=6,
)  # fmt: skip
GROUPED = WORLD.examples()


@pytest.fixture(scope="module", autouse=True)
def coarse() -> Iterator[None]:
    """Calibrate on a tenth of the points: test_intrinsic.py asks what a calibrated dimension is worth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intrinsic, "POINTS", intrinsic.POINTS // 10)
        intrinsic._gaussian_estimates.cache_clear()
        yield
    intrinsic._gaussian_estimates.cache_clear()


def setting(name, side="right", examples=GROUPED, world=WORLD):
    tokenizer = world.tokenizer()
    tokenizer.padding_side = side
    torch.manual_seed(0)
    model, weights = language_model(name, tokenizer)
    return Setting(model, weights, weights, False, examples, 0)


def measured(probe, given):
    return probe.measurement(given)(given.start)


def places(rows):
    keys = ("layer", "arm", "quantity", "subspace", "k")
    return {tuple(row.get(key) for key in keys): row["value"] for row in rows}


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "llama_tied", "qwen2", "qwen3", "gpt2", "gemma2"])
def test_it_measures_every_layer_of_every_architecture(name):
    rows = measured(PROBE, setting(name))
    assert {row["layer"] for row in rows} == {0, 1}
    assert {row["treatment"] for row in rows} == set(GROUPED.groups)
    assert len(places(rows)) == len(rows)  # no number twice
    values = places(rows)
    for layer in (0, 1):
        for arm in ("heldout/known", "impossible/known"):
            assert 0 <= values[layer, arm, "auroc_projection", "residual", None] <= 1
            # The best of four arrangements at most, as there are three permutations.
            assert values[layer, arm, "auroc_logistic_max_p_value", "residual", None] in (0.25, 0.5, 0.75, 1)
            assert values[layer, arm, "fisher_sensitivity", "residual", None] > 0
            assert -1 <= values[layer, arm, "gradient_coupling", "residual", None] <= 1
            assert values[layer, arm, "fisher_quadratic_difference", "residual", None] <= 0.05


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "qwen2", "gpt2"])
def test_left_and_right_padding_give_the_same_numbers(name):
    # of different lengths, which the world's prompts are as well
    longer = [
        replace(question, prompt=f"nobody knows , {question.prompt}")
        for question in GROUPED.groups["known"][::2]
    ]
    groups = {**GROUPED.groups, "known": [*longer, *GROUPED.groups["known"][1::2]]}
    examples = replace(GROUPED, groups=groups)
    left, right = (places(measured(PROBE, setting(name, side, examples))) for side in ("left", "right"))
    assert left.keys() == right.keys()
    for place, value in left.items():
        assert_close(value, right[place], rtol=2e-3, atol=2e-4, msg=lambda text, at=place: f"{at}: {text}")


def test_the_last_state_is_that_of_the_prompt_alone_and_the_tail_goes_on_from_it():
    for side in ("left", "right"):
        given = setting("qwen3", side)
        model, network = given.model, given.model.with_weights(given.start).requires_grad_(False).eval()
        texts = ["question : answer :", "answer :", "question : nobody knows ? answer :"]
        together = last_states(model, network, texts, [0, 1])
        for index, text in enumerate(texts):
            ids = torch.tensor([model.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                alone = network(ids, output_hidden_states=True)
            assert_close(together[0][index], alone.hidden_states[1][0, -1], rtol=1e-4, atol=1e-5)
            for layer in (0, 1):
                tail = Tail.of(model, network, texts, layer)
                assert_close(tail.states[index], together[layer][index], rtol=1e-4, atol=1e-5)
                assert_close(tail(tail.states)[index], alone.logits[0, -1], rtol=1e-4, atol=1e-4)


def test_a_planted_boundary_is_found_and_one_that_the_output_reads_is_sensitive():
    given = setting("llama")
    rows = places(measured(replace(PROBE, k=32), given))
    assert_close(rows[1, "heldout/known", "overlap", "output_top", 32], 1.0, rtol=1e-5, atol=0)


def test_the_layers_asked_for_are_measured_and_others_are_refused():
    given = setting("llama")
    assert {row["layer"] for row in measured(replace(PROBE, layers=[1]), given)} == {1}
    with pytest.raises(ValueError, match="there is no layer 2: the model has layers 0 to 1"):
        replace(PROBE, layers=[0, 2]).check(given.model.architecture)
    with pytest.raises(ValueError, match=r"probe\.uncertainty\.k must be 1 to 32"):
        replace(PROBE, k=33).check(given.model.architecture)
    with pytest.raises(ValueError, match="output is at most 32"):
        replace(PROBE, output=33).check(given.model.architecture)


def test_groups_of_different_sizes_are_cut_to_one_and_the_log_says_so(caplog):
    groups = {**GROUPED.groups, "heldout": GROUPED.groups["heldout"][:17]}
    with caplog.at_level("INFO"):
        rows = measured(
            replace(PROBE, layers=[0]), setting("llama", examples=replace(GROUPED, groups=groups))
        )
    assert "17 prompts of each group, out of known 24, heldout 17, impossible 24" in caplog.text
    assert "'nobody knows' is 2 tokens" not in caplog.text and "' nobody knows' has 2 tokens" in caplog.text
    assert {row["n"] for row in rows if row["quantity"] == "mle_dimension"} == {17}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"groups": {}}, "has no prompt groups: set data.groups"),
        ({"abstentions": ()}, "has no abstention phrase: set data.abstentions"),
        ({"abstentions": (" dunno",)}, "no token for the abstention ' dunno'"),
        ({"groups": {"a": [Question("x", "")] * 5, "b": []}}, "too small for probe.uncertainty.neighbours=5"),
    ],
)
def test_data_that_will_not_do_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        PROBE.measurement(setting("llama", examples=replace(GROUPED, **changed)))


def test_thresholds_that_are_no_cosine_distances_are_refused():
    with pytest.raises(ValueError, match="thresholds are cosine distances, 0 to 2, got 3"):
        Uncertainty(thresholds=[0.1, 3])

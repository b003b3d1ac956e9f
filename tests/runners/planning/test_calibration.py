from transformers import LlamaConfig

from runners.planning.calibration import proportioned, shrunk
from runners.planning.proxy import proxy_of
from weightgeom.causal.effects import Effects
from weightgeom.interventions.rank1 import Rank1
from weightgeom.probes.rsf import RSF

PROXY = proxy_of(
    LlamaConfig(hidden_size=1024, num_hidden_layers=32, num_attention_heads=16, num_key_value_heads=4)
)  # of 2 layers and width 512


def test_layers_and_dimensions_are_those_of_the_proxy_in_proportion() -> None:
    edits = proportioned(Rank1(layers=[0, 7, 16, 31], k=72), PROXY)
    assert edits.layers == [0, 1] and edits.k == 36
    assert proportioned(RSF(k=[1, 128, 512]), PROXY).k == [1, 64, 256]
    assert proportioned(Rank1(), PROXY) == Rank1()  # all layers, and dimensions by the width


def test_samples_shrink_in_all_that_a_measurement_holds() -> None:
    edits = shrunk(Rank1(tokens=1000, effects=Effects(tokens=400, pairs=8, questions=0)), 0.1)
    assert (edits.tokens, edits.effects.tokens, edits.effects.pairs, edits.effects.questions) == (
        100,
        40,
        2,
        0,
    )

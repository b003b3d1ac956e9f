from functools import cache
from pathlib import Path

import pytest
from networks import CONFIGS, MIXTURES
from transformers import OPTConfig

from weightgeom import architectures
from weightgeom.check import CHECKS
from weightgeom.models.residual import architecture_of
from weightgeom.models.specimen import Specimen

ALL = CONFIGS | MIXTURES


@cache
def specimen(name: str) -> Specimen:
    return Specimen.of(ALL[name](50, 16))


@pytest.mark.parametrize("invariant", CHECKS, ids=lambda invariant: invariant.__name__)
@pytest.mark.parametrize("name", ALL)
def test_a_map_describes_its_network(name, invariant):
    invariant(specimen(name))


def test_every_map_has_a_network_that_it_is_tested_on():
    files = {path.stem for path in Path(architectures.__path__[0]).glob("[!_]*.py")}
    assert {config(50, 16).model_type for config in ALL.values()} == files


@pytest.mark.parametrize("variant", [{"do_layer_norm_before": False}, {"word_embed_proj_dim": 16}])
def test_the_variant_of_opt_350m_is_refused(variant):
    message = r"no residual-stream map for an OPT with post-norms or projected embeddings \(opt-350m\): use"
    with pytest.raises(NotImplementedError, match=message):
        architecture_of(OPTConfig(hidden_size=32, num_attention_heads=4, **variant))

import copy
from math import log
from typing import Any

import pytest
import torch
from updates import CONFIG, base, gaussian, moved

from weightgeom.models.residual import architecture_of
from weightgeom.origins.features import features


def of(before: Any, after: Any) -> dict[str, float]:
    return features(before, after, CONFIG)


def test_an_update_of_noise_has_every_measurement_at_its_null() -> None:
    before = base()
    measured = of(before, moved(before, gaussian(before, 0.02)))
    assert measured["relative_norm"] == pytest.approx(0.02, rel=0.02)
    for kind in ("q", "k", "v", "o", "up", "down"):
        # Every matrix moves by the same share; the ranks of one Gaussian matrix are those of another.
        assert measured[f"size.{kind}"] == pytest.approx(0, abs=0.05)
        assert measured[f"delta_stable_rank.{kind}"] == pytest.approx(0, abs=0.15)
        assert measured[f"delta_effective_rank.{kind}"] == pytest.approx(0, abs=0.03)
        # Of four singular directions of a random matrix, whose gaps are narrow, in three layers.
        assert measured[f"left_angle.{kind}"] == pytest.approx(0, abs=0.4)
        assert measured[f"invisible_share.{kind}"] == pytest.approx(0, abs=0.01)
    # The ratio of 4096 entries in 4 of 32 dimensions: sd of the fraction 0.0052 each, 0.04 of the ratio.
    assert measured["write_ratio.down"] == pytest.approx(0, abs=0.1)
    assert measured["share.embed"] == pytest.approx(0.5, abs=0.02) and measured["moved_share.embed"] == 1


def test_the_measurements_do_not_change_with_the_size_of_the_update() -> None:
    before = base()
    u, v = torch.randn(128), torch.randn(32)
    low = {"gpt_neox.layers.1.mlp.dense_h_to_4h.weight": torch.outer(u, v)}
    updates = {
        name: 0.002 * noise_of + 1e-4 * low.get(name, 0) for name, noise_of in gaussian(before, 1).items()
    }
    small, large = (
        of(before, moved(before, {name: factor * update for name, update in updates.items()}))
        for factor in (0.5, 1.0)
    )
    assert large["relative_norm"] == pytest.approx(2 * small["relative_norm"], rel=1e-3)
    names = [name for name in small if name.partition(".")[0] in ("size", "delta_stable_rank", "write_ratio")]
    names += ["profile", "rank.unembed", "rows.embed", "share.norm", "delta_effective_rank.up"]
    assert {name: small[name] for name in names} == pytest.approx(
        {name: large[name] for name in names}, abs=0.01
    )


def test_a_write_inside_the_prediction_subspace_has_the_largest_ratio() -> None:
    before = base()
    unembed = before["lm_head.weight"].double()
    centred = unembed - unembed.mean(0)
    _, _, right = torch.linalg.svd(centred)  # the final norm's gain is 1 at first
    inside = right[:4].T.float()
    updates = {
        f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight": 0.01 * inside @ torch.randn(4, 128)
        for layer in range(3)
    }
    measured = of(before, moved(before, updates))
    # k = d / 8 = 4 of 32 dimensions hold everything.
    assert measured["write_ratio.down"] == pytest.approx(log(8), abs=1e-3)
    assert (
        measured["write_ratio.o"] == 0
        and measured["share.embed"] == 0
        and measured["moved_share.unembed"] == 0
    )


def test_an_update_of_rank_one_in_few_tokens_is_seen_as_that() -> None:
    before = base()
    rows = torch.zeros(96, 32)
    rows[[3, 5]] = 0.1
    updates = {"gpt_neox.embed_in.weight": rows}
    for matrix in architecture_of(CONFIG).matrices:
        shape = before[matrix.parameter].shape
        updates[matrix.parameter] = 0.01 * torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))
    measured = of(before, moved(before, updates))
    assert measured["moved_share.embed"] == pytest.approx(2 / 96, rel=1e-5)
    assert measured["rows.embed"] == pytest.approx(2 / 96, rel=1e-5)
    assert measured["rank.embed"] == pytest.approx(1 / 32, rel=1e-3)
    # A Gaussian 32 x 128 matrix has a stable rank of about
    # 32 · 128 / (√32 + √128)² = 14.2, and more where its largest singular value is below the edge.
    assert measured["delta_stable_rank.up"] == pytest.approx(-log(14.9), abs=0.15)


def test_nothing_moved_is_refused() -> None:
    before = base()
    with pytest.raises(ValueError, match="no matrix of the residual stream has moved"):
        of(before, copy.deepcopy(before))

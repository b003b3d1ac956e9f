import copy
from itertools import permutations
from typing import Any

import pandas as pd
import pytest
import torch
from llamas import llama, saved

import weightgeom as wg
from runners.cli.align import aligned
from weightgeom.analysis.referee import Update, verdicts
from weightgeom.claims.dpo_near_orthogonal import DpoNearOrthogonal
from weightgeom.claims.objective_from_spectrum import ObjectiveFromSpectrum
from weightgeom.claims.universal_subspaces import UniversalSubspaces

BASE = llama(0)


def trained(direction: int, seed: int, own: float = 0.5) -> Any:
    """The base moved along a direction of its objective, and by some noise of its seed."""
    network = copy.deepcopy(BASE)
    for weights, number in ((1.0, direction), (own, 100 + seed)):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.01 * weights * torch.randn(parameter.shape, generator=generator)
    return network


def whole(table: pd.DataFrame, quantity: str) -> dict[tuple[str, str], float]:
    rows = table[(table["matrix"] == "") & (table["quantity"] == quantity)]
    pairs = zip(rows["treatment"], rows["against"], strict=True)
    return dict(zip(pairs, rows["value"].astype(float), strict=True))


def test_the_cosine_of_two_trainings_is_that_of_their_updates() -> None:
    ends = {"dpo": trained(1, 0), "ce": trained(2, 1)}
    table = wg.alignments(BASE, {name: [end] for name, end in ends.items()})
    flat = []
    for end in ends.values():
        start = dict(BASE.named_parameters())
        updates = [
            (parameter - start[name]).detach().flatten()
            for name, parameter in end.named_parameters()
            if "proj" in name
        ]
        flat.append(torch.cat(updates).double())
    expected = float(torch.cosine_similarity(flat[0], flat[1], dim=0))
    assert whole(table, "cosine") == {("ce", "dpo"): pytest.approx(expected, abs=1e-6)}
    assert set(whole(table, "alignment_ratio")) == set(permutations(ends))
    assert not table["quantity"].str.startswith("within").any()
    assert len(table[(table["quantity"] == "cosine") & (table["matrix"] != "")]) == 2 * 7


def test_seeds_of_one_training_are_more_alike_than_those_of_two() -> None:
    seeds = {
        name: [trained(number, 10 * number + seed) for seed in range(3)]
        for number, name in ((1, "dpo"), (2, "ce"))
    }
    table = wg.alignments(BASE, seeds)
    pair = ("ce", "dpo")
    # Each update is a + s / 2, with a that of the objective: of seeds the cosine is 1 / (1 + 1/4).
    assert whole(table, "within_cosine_mean")[pair] == pytest.approx(0.8, abs=0.03)
    assert whole(table, "between_cosine_mean")[pair] == pytest.approx(0, abs=0.03)
    assert whole(table, "within_cosine_p_value")[pair] == pytest.approx(2 / 20)
    assert {"dpo.0", "dpo.2", "ce.1"} <= set(table["treatment"])
    update = Update("all", {"alignment": table}, 1)
    claims = [DpoNearOrthogonal(), ObjectiveFromSpectrum(), UniversalSubspaces()]
    verdict_of = verdicts(claims, [update]).set_index("claim")
    orthogonal = verdict_of.loc["DpoNearOrthogonal"]
    assert (orthogonal["verdict"], orthogonal["null"]) == ("supported", pytest.approx(0.8, abs=0.03))
    assert verdict_of.loc["ObjectiveFromSpectrum", "n"] == 6
    shared = verdict_of.loc["UniversalSubspaces"]  # of pairs alone: 3 seeds of each, both ways
    assert (shared["verdict"], shared["n"]) == ("contradicted", 18)
    assert 0 < shared["null"] < 1


@pytest.mark.slow
def test_the_command_writes_table_and_heat_maps(tmp_path, capsys) -> None:
    for name, network in (("base", BASE), ("a", trained(1, 0)), ("b", trained(1, 1)), ("c", trained(2, 2))):
        saved(network, tmp_path / name)
    named = [f"dpo={tmp_path / 'a'}", f"dpo={tmp_path / 'b'}", f"ce={tmp_path / 'c'}"]
    aligned(str(tmp_path / "base"), named, tmp_path / "out")
    table = pd.read_parquet(tmp_path / "out/alignment.parquet")
    assert set(whole(table, "cosine")) == {("dpo.1", "dpo.0"), ("ce", "dpo.0"), ("ce", "dpo.1")}
    for ending in ("png", "pdf", "csv"):
        assert (tmp_path / f"out/alignment.{ending}").stat().st_size > 1000
    output = capsys.readouterr().out
    assert "dpo.1" in output and "Updates of different trainings" in output
    assert not [line for line in output.splitlines()[:-1] if len(line) > 80]  # but for the path
    judged = pd.read_csv(tmp_path / "out/referee.csv").set_index("claim")["verdict"]
    # Updates of independent directions share nothing; the seeds are too few for the others.
    assert dict(judged) == {
        "DpoNearOrthogonal": "not testable here",
        "ObjectiveFromSpectrum": "not testable here",
        "UniversalSubspaces": "contradicted",
    }
    with pytest.raises(ValueError, match="has no name: write NAME="):
        aligned(str(tmp_path / "base"), [str(tmp_path / "a")], tmp_path / "out")


def test_one_training_one_that_did_not_move_and_a_bare_end_are_refused() -> None:
    end = trained(1, 0)
    with pytest.raises(ValueError, match="two or more trainings"):
        wg.alignments(BASE, {"dpo": [end]})
    with pytest.raises(TypeError, match="must be a list"):
        wg.alignments(BASE, {"dpo": "somewhere", "ce": [end]})
    with pytest.raises(ValueError, match="no matrix of ce has moved"):
        wg.alignments(BASE, {"dpo": [end], "ce": [copy.deepcopy(BASE)]})
    with pytest.raises(ValueError, match="a state dict says nothing of its network"):
        wg.alignments(BASE.state_dict(), {"dpo": [end.state_dict()], "ce": [end.state_dict()]})

# SPDX-License-Identifier: Apache-2.0
"""Statistics: their states, how they are merged, and the store that keeps them layer by layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fourfold.calibration.statistics import DataSummary, ModelSummary, Statistics, merged
from fourfold.calibration.store import StatisticsStore
from fourfold.statistics import STATISTICS, Site, Statistic

SITES = [Site("a.experts.gate_up", 32, 4), Site("a.q_proj", 16)]


def rows_of(site: Site, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(9, site.width, generator=generator)
    experts = torch.randint(-1, site.experts or 1, (9, 2), generator=generator)
    return rows, None if site.experts is None else experts


@pytest.mark.parametrize("site", SITES, ids=["experts", "linear"])
@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=list(STATISTICS))
def test_merging_is_seeing_everything(statistic: Statistic, site: Site) -> None:
    both, parts = statistic.new(site), [statistic.new(site), statistic.new(site)]
    for seed, part in enumerate(parts):
        for state in (both, part):
            statistic.update(state, *rows_of(site, seed))
    merged_state = statistic.merge(*parts)
    assert merged_state.keys() == both.keys()
    for name, tensor in both.items():
        assert name.partition(".")[0] == statistic.name
        assert torch.equal(merged_state[name], tensor)
        assert bool(tensor.any())
    assert statistic.nbytes(site) == sum(tensor.nbytes for tensor in both.values())


def statistics_of(seed: int) -> Statistics:
    statistics = Statistics(DataSummary("random", "", 1, 9, 9), model=ModelSummary("A", "b"))
    for site in SITES:
        state = {}
        for statistic in STATISTICS.values():
            new = statistic.new(site)
            statistic.update(new, *rows_of(site, seed))
            state |= new
        statistics.sites[site.name] = state
    return statistics


def assert_equal(one: Statistics, other: Statistics) -> None:
    assert (one.data, one.model) == (other.data, other.model)
    assert one.sites.keys() == other.sites.keys()
    for site, state in one.sites.items():
        assert state.keys() == other.sites[site].keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, other.sites[site][name])


def test_a_site_that_one_of_two_saw() -> None:
    one, other = statistics_of(1), statistics_of(2)
    del other.sites["a.q_proj"]
    result = merged([one, other])
    assert torch.equal(result.sites["a.q_proj"]["amax"], one.sites["a.q_proj"]["amax"])
    tokens = [x.experts["a.experts"].tokens for x in (one, other)]
    assert torch.equal(result.experts["a.experts"].tokens, tokens[0] + tokens[1])


def test_the_store_gives_back_what_it_was_given(tmp_path: Path) -> None:
    store = StatisticsStore(tmp_path / "statistics")
    assert store.load() == {}
    stored = {layer: statistics_of(number) for number, layer in enumerate((0, 12, None))}
    for layer, statistics in stored.items():
        store.save(layer, statistics_of(99))
        store.save(layer, statistics)
    (store.folder / ".layer-00013.safetensors.partial").write_bytes(b"torn")
    loaded = store.load()
    assert loaded.keys() == stored.keys()
    for layer, statistics in loaded.items():
        stored[layer].drop_large()
        assert_equal(statistics, stored[layer])


def test_a_damaged_file_counts_as_absent(tmp_path: Path) -> None:
    store = StatisticsStore(tmp_path)
    for layer in (0, 1):
        store.save(layer, statistics_of(layer))
    file = tmp_path / "layer-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert store.load().keys() == {0}

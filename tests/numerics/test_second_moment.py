# SPDX-License-Identifier: Apache-2.0
"""Proves of second moments: they are Σ x·xᵀ, the same however batches are shared out over ranks;
what no row reached is zero, and an expert without rows can take the pool."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.algorithms.second_order import shrunk
from fourfold.statistics import (
    MomentBlocks,
    MomentDiagonal,
    Moments,
    PooledMoment,
    SecondMoment,
    Site,
    State,
)

LINEAR, EXPERTS = Site("a.q_proj", 48), Site("a.experts.gate_up", 48, 4)
ALL = [SecondMoment(), PooledMoment(), MomentBlocks(), MomentDiagonal()]
Batch = tuple[Tensor, Tensor | None]


def batches(site: Site, number: int = 40, dtype: torch.dtype = torch.float32) -> list[Batch]:
    """Batches of unlike size and energy, with an outlier channel; some rows reach no expert."""
    draw = torch.Generator().manual_seed(number)
    made: list[Batch] = []
    for _ in range(number):
        count = int(torch.randint(1, 60, (), generator=draw))
        rows = torch.randn(count, site.width, generator=draw) * 2.0 ** torch.randint(
            -3, 4, (), generator=draw
        )
        rows[:, 5] *= 60
        experts = torch.randint(-1, (site.experts or 1) - 1, (count, 2), generator=draw)
        made.append((rows.to(dtype), None if site.experts is None else experts))
    return made


def state_of(statistic: Moments, site: Site, seen: list[Batch]) -> State:
    state = statistic.new(site)
    for rows, experts in seen:
        statistic.update(state, rows, experts)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", [LINEAR, EXPERTS], ids=["linear", "experts"])
@pytest.mark.parametrize("statistic", ALL, ids=lambda x: x.name)
def test_the_same_for_any_ranks(statistic: Moments, site: Site, dtype: torch.dtype) -> None:
    seen = batches(site, dtype=dtype)
    alone = state_of(statistic, site, seen)
    for ranks in (2, 3, 40):
        for shared in (seen, seen[::-1]):
            states = [state_of(statistic, site, shared[rank::ranks]) for rank in range(ranks)]
            merged = states[0]
            for state in states[1:]:
                merged = statistic.merge(merged, state)
            assert merged.keys() == alone.keys()
            for name, tensor in alone.items():
                assert torch.equal(merged[name], tensor)


@pytest.mark.parametrize("site", [LINEAR, EXPERTS], ids=["linear", "experts"])
def test_cross_moments(site: Site) -> None:
    """They are Σ (x − x̂)·x̂ᵀ, whole, the same in any order of batches."""
    statistic, seen = SecondMoment(), batches(site)
    states = []
    for order in (1, -1):
        state = statistic.new(site) | statistic.new_cross(site)
        for rows, experts in seen[::order]:
            statistic.update(state, rows, experts)
            statistic.update_cross(state, rows, rows.roll(1, dims=1) / 100, experts)
        states.append(state)
    assert torch.equal(*(state["second_moment.cross"] for state in states))
    rows, experts = zip(*seen, strict=True)
    x_RI = torch.cat(rows).double()
    if site.experts is not None:
        x_RI = x_RI[_number_of(torch.cat(experts), 1)]
    finished = statistic.finish(states[0])
    own = finished if site.experts is None else statistic.of_expert(finished, 1)
    wanted = (x_RI.roll(1, dims=1) / 100).T @ x_RI / len(x_RI)
    torch.testing.assert_close(
        own["second_moment.cross"].double(),
        wanted,
        rtol=1e-5,
        atol=1e-6 * float(wanted.abs().max()),
    )


@pytest.mark.parametrize("site", [LINEAR, EXPERTS], ids=["linear", "experts"])
def test_it_is_the_second_moment(site: Site) -> None:
    """Each batch is off by float32's sum of its rows, and by half of a step of its rounding."""
    seen = batches(site)
    finished = SecondMoment().finish(state_of(SecondMoment(), site, seen))
    for number in range(site.experts or 1):
        wanted, reach, count = torch.zeros(48, 48).double(), torch.zeros(48, 48).double(), 0
        for rows, experts in seen:
            mine = rows if experts is None else rows[_number_of(experts, number)]
            x_RI = mine.double()
            wanted += x_RI.T @ x_RI
            mean = float(x_RI.square().sum()) / 48
            reach += len(x_RI) * 2.0**-24 * x_RI.abs().T @ x_RI.abs() + 2.0**-22 * mean
            count += len(x_RI)
        own = finished if site.experts is None else SecondMoment().of_expert(finished, number)
        assert int(own["second_moment.rows"]) == count
        mean_II = own["second_moment"].double()
        assert mean_II.dtype == torch.float64
        error_II = (mean_II * max(1, count) - wanted).abs()
        assert (error_II <= reach + 2.0**-24 * wanted.abs()).all()
        assert torch.equal(mean_II, mean_II.T)


def _number_of(experts: Tensor, number: int) -> Tensor:
    """The rows that an expert reads, once for each time that it is named."""
    return (experts == number).nonzero(as_tuple=True)[0]


@pytest.mark.parametrize("site", [LINEAR, EXPERTS], ids=["linear", "experts"])
def test_parts_are_those_of_the_whole(site: Site) -> None:
    """Sums of small whole numbers are exact."""
    seen = [(rows.clamp(-3, 3).round(), experts) for rows, experts in batches(site)]
    whole, blocks, diagonal = (
        statistic.finish(state_of(statistic, site, seen))
        for statistic in (SecondMoment(), MomentBlocks(), MomentDiagonal())
    )
    for end in ("", ".rows", ".pool")[: 2 if site.experts is None else 3]:
        moment = whole[f"second_moment{end}"]
        if end == ".rows":
            assert torch.equal(blocks[f"second_moment_blocks{end}"], moment)
            assert torch.equal(diagonal[f"second_moment_diagonal{end}"], moment)
            continue
        wanted = torch.stack([moment[..., i : i + 16, i : i + 16] for i in (0, 16, 32)], dim=-3)
        assert torch.equal(blocks[f"second_moment_blocks{end}"], wanted)
        energy = moment.diagonal(dim1=-2, dim2=-1)
        assert torch.equal(diagonal[f"second_moment_diagonal{end}"], energy)


def test_an_expert_without_rows_has_the_pool() -> None:
    finished = SecondMoment().finish(state_of(SecondMoment(), EXPERTS, batches(EXPERTS)))
    assert [bool(rows) for rows in finished["second_moment.rows"]] == [True, True, True, False]
    pool = finished["second_moment.pool"]
    assert torch.equal(shrunk(SecondMoment().of_expert(finished, 3)), pool)
    few = {"second_moment": 3 * pool, "second_moment.rows": torch.tensor(64),
           "second_moment.pool": pool}  # fmt: skip
    torch.testing.assert_close(shrunk(few), 2 * pool)
    rows = finished["second_moment.rows"].double()
    total = (finished["second_moment"].double() * rows[:, None, None]).sum(dim=0)
    torch.testing.assert_close(total / rows.sum(), pool.double(), rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("site", [LINEAR, EXPERTS], ids=["linear", "experts"])
@pytest.mark.parametrize("statistic", ALL, ids=lambda x: x.name)
def test_what_no_row_reached_is_zero(statistic: Moments, site: Site) -> None:
    zeros = [(torch.zeros(7, site.width), None if site.experts is None else torch.zeros(7).long())]
    for seen in ([], zeros):
        finished = statistic.finish(state_of(statistic, site, seen))
        for name, tensor in finished.items():
            assert not tensor.any() or name.endswith(".rows")
            assert torch.isfinite(tensor).all()


@pytest.mark.gpu
@pytest.mark.parametrize("statistic", ALL, ids=lambda statistic: statistic.name)
def test_sums_on_the_cpu_of_rows_on_a_gpu(statistic: Moments) -> None:
    """They are those on the GPU, since products are computed there in either case."""
    on_cpu, on_gpu = statistic.new(EXPERTS), statistic.new(EXPERTS, "cuda")
    for rows, experts in batches(EXPERTS, dtype=torch.bfloat16):
        assert experts is not None
        for state in (on_cpu, on_gpu):
            statistic.update(state, rows.cuda(), experts.cuda())
    assert on_cpu.keys() == on_gpu.keys()
    assert all(torch.equal(tensor, on_gpu[key].cpu()) for key, tensor in on_cpu.items())

# SPDX-License-Identifier: Apache-2.0
"""Proves that scale groups quantized side by side on a device are those that the CPU quantizes one
by one: the same codes but in rows that rounding decides, the same figures, and the same damping.

The device is the CPU here, or a GPU for tests that are marked so.

A code differs only where two values lose the same within what float32 rounds, and then the rest of
its row may. So few rows do, and what these lose more or less is little beside the loss of all: the
tests allow 1 % of the rows and 0.1 % of the loss.

Shapes: N groups, O outputs, I inputs.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fourfold.algorithms import Weight
from fourfold.algorithms.gptq import GPTQ
from fourfold.algorithms.gptq_joint import GPTQJoint
from fourfold.algorithms.second_order import MOST_ERROR, SecondOrder, shrunk
from fourfold.errors import NonFiniteError
from fourfold.formats.nvfp4.format import BLOCK_SCALE, CODES, NVFP4
from fourfold.formats.nvfp4.second_order import Moment

from .second_moments import correlated, gaussian, moment, ordinary

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ALGORITHMS = [GPTQJoint(), GPTQJoint(descent=2), GPTQ(), GPTQ(descent=1)]
MOST_ROWS, MOST_LOSS = 0.01, 0.001
WIDTH = 144
Group = list[Weight]


def own(rng: np.random.Generator) -> dict[str, Any]:
    return {"second_moment": ordinary(rng, WIDTH), "second_moment.rows": torch.tensor(500)}


def of_expert(rng: np.random.Generator, rows: int) -> dict[str, Any]:
    """An expert that few tokens reached, or none, and what all experts saw."""
    x_RI = correlated(rng, WIDTH, rows)
    pool_II = ordinary(np.random.default_rng(1), WIDTH)
    return {
        "second_moment": moment(x_RI),
        "second_moment.rows": torch.tensor(rows),
        "second_moment.pool": pool_II,
    }


def moved(rng: np.random.Generator) -> dict[str, Any]:
    """Inputs of a quantized model, which differ from those of the source."""
    x_RI = correlated(rng, WIDTH, 600)
    rounded_RI = x_RI + 0.1 * correlated(rng, WIDTH, 600)
    return {
        "second_moment": moment(rounded_RI),
        "second_moment.cross": (x_RI - rounded_RI).T @ rounded_RI / 600,
        "second_moment.rows": torch.tensor(600),
    }


def buffers(rows: int) -> dict[str, Tensor]:
    return {
        CODES: torch.zeros(rows, WIDTH // 2, dtype=torch.uint8),
        BLOCK_SCALE: torch.zeros(rows, WIDTH // 16, dtype=torch.uint8),
    }


def group(
    rng: np.random.Generator, statistics: Mapping[str, Any], outputs: Sequence[int] = (40, 24)
) -> Group:
    """Weights that read the same inputs."""
    return [
        Weight(f"w{number}", gaussian(rng, rows, WIDTH).bfloat16(), buffers(rows), statistics)
        for number, rows in enumerate(outputs)
    ]


def loss(weights: Group, group_scale: float | None) -> float:
    assert group_scale is not None
    total = 0.0
    for weight in weights:
        damped = Moment(shrunk(weight.statistics, next(iter(weight.statistics))), 0.01)
        values_OI = torch.empty(weight.matrix_OI.shape)
        NVFP4().dequantize(weight.out, group_scale, values_OI)
        d_OI = (values_OI - weight.matrix_OI.double())[:, damped.order_I]
        total += float(((d_OI @ damped.h_II.double()) * d_OI).sum())
    return total


def copies(groups: Sequence[Group]) -> list[Group]:
    return [[replace(x, out=buffers(len(x.matrix_OI))) for x in weights] for weights in groups]


def compare(algorithm: SecondOrder, groups: Sequence[Group], device: str) -> None:
    alone, together = copies(groups), copies(groups)
    one_by_one = [algorithm.quantize(weights, NVFP4()) for weights in alone]
    stacked = algorithm.quantize_stack(together, NVFP4(), torch.device(device))
    is_equal_O = torch.cat([
        (mine.out[part] == theirs.out[part]).all(dim=1)
        for part in (CODES, BLOCK_SCALE)
        for of_group in zip(alone, together, strict=True)
        for mine, theirs in zip(*of_group, strict=True)
    ])  # fmt: skip
    assert is_equal_O.double().mean() >= 1 - MOST_ROWS
    for weights, others, (scale, figures), (other, other_figures) in zip(
        alone, together, one_by_one, stacked, strict=True
    ):
        assert other == pytest.approx(scale, rel=2.0**-11)
        assert loss(others, other) == pytest.approx(loss(weights, scale), rel=MOST_LOSS)
        for mine, theirs in zip(figures, other_figures, strict=True):
            assert (mine.amax, mine.sum_sq_w) == (theirs.amax, theirs.sum_sq_w)
            assert (mine.asymmetric, mine.damping) == (theirs.asymmetric, theirs.damping)
            assert theirs.sum_sq_err == pytest.approx(mine.sum_sq_err, rel=MOST_LOSS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
def test_each_group_is_as_if_alone(algorithm: SecondOrder, device: str) -> None:
    rng = np.random.default_rng(0)
    compare(algorithm, [group(rng, own(rng)) for _ in range(5)], device)


@pytest.mark.parametrize("device", DEVICES)
def test_experts_that_few_tokens_reached(device: str) -> None:
    """They take a part of what all experts saw; one without tokens takes all of it."""
    rng = np.random.default_rng(1)
    groups = [group(rng, of_expert(rng, rows)) for rows in (0, 1, 40, 900)]
    compare(GPTQJoint(descent=1), groups, device)


@pytest.mark.parametrize("device", DEVICES)
def test_experts_that_share_a_moment(device: str) -> None:
    """It is factored once, and every group keeps a scale of its own."""
    rng = np.random.default_rng(2)
    pool = {"pooled_moment": ordinary(rng, WIDTH), "pooled_moment.rows": torch.tensor(500)}
    groups = [group(rng, pool) for _ in range(4)]
    for number, weights in enumerate(groups):
        groups[number] = [replace(x, matrix_OI=x.matrix_OI * 2.0**number) for x in weights]
    compare(GPTQJoint(descent=2), groups, device)
    compare(GPTQ(descent=1), groups, device)


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_that_have_moved(device: str) -> None:
    rng = np.random.default_rng(3)
    groups = [
        [replace(x, asymmetric=part) for x in group(rng, moved(rng))] for part in (0.0, 0.5, 1.0)
    ]
    alone = copies(groups)
    compare(GPTQJoint(), groups, device)
    for weights in alone:
        _, figures = GPTQJoint().quantize(weights, NVFP4())
        assert figures[0].asymmetric == weights[0].asymmetric


@pytest.mark.parametrize("device", DEVICES)
def test_what_loses_too_much_is_damped_more(device: str) -> None:
    """Only the group that does: its inputs have moved so far that its targets are no weights."""
    rng = np.random.default_rng(4)
    far = moved(rng)
    far["second_moment.cross"] = 3 * far["second_moment"]
    groups = [
        [replace(x, asymmetric=1.0) for x in group(rng, statistics)]
        for statistics in (moved(rng), far, moved(rng))
    ]
    compare(GPTQJoint(), groups, device)
    results = GPTQJoint().quantize_stack(groups, NVFP4(), torch.device(device))
    assert [figures[0].damping for _, figures in results] == [None, 0.1, None]
    assert [figures[0].asymmetric for _, figures in results] == [1.0, 0.0, 1.0]
    assert all(x.relative_error <= MOST_ERROR for _, figures in results for x in figures)


@pytest.mark.parametrize("device", DEVICES)
def test_a_singular_moment_is_damped_more(device: str) -> None:
    """With more damping than the algorithm has, the codes are those of a run that began with it."""
    rng = np.random.default_rng(5)
    singular = {"second_moment": -0.05 * torch.eye(WIDTH) + torch.ones(WIDTH, WIDTH),
                "second_moment.rows": torch.tensor(9)}  # fmt: skip
    weights = group(rng, singular)
    ((scale, figures),) = GPTQJoint().quantize_stack([weights], NVFP4(), torch.device(device))
    assert figures[0].damping == pytest.approx(0.1)
    again = copies([weights])
    ((other, _),) = GPTQJoint(damping=0.1).quantize_stack(again, NVFP4(), torch.device(device))
    assert other == scale
    assert all(
        torch.equal(mine.out[part], theirs.out[part])
        for mine, theirs in zip(weights, again[0], strict=True)
        for part in mine.out
    )
    (_, on_cpu) = GPTQJoint().quantize(copies([weights])[0], NVFP4())
    assert on_cpu[0].damping == figures[0].damping


class Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that operations have returned and that are still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.now = 0
        self._users: Counter[int] = Counter()
        """By address of its memory, the number of tensors that have it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tensors_in((args, kwargs))}
        for tensor in tensors_in(result):
            memory = tensor.untyped_storage()
            address, nbytes = memory.data_ptr(), memory.nbytes()
            if address not in self._users and address in given:
                continue  # it was there before
            if not self._users[address]:
                self.now += nbytes
                self.most = max(self.most, self.now)
            self._users[address] += 1
            weakref.finalize(tensor, self._drop, address, nbytes)
        return result

    def _drop(self, address: int, nbytes: int) -> None:
        self._users[address] -= 1
        if not self._users[address]:
            del self._users[address]
            self.now -= nbytes


def tensors_in(nested: Any) -> list[Tensor]:
    return [x for x in tree_leaves(nested) if isinstance(x, Tensor)]


@pytest.mark.parametrize("outputs", [(16, 16), (400, 400)])
@pytest.mark.parametrize("algorithm", [GPTQJoint(descent=1), GPTQ(descent=1)], ids=repr)
def test_the_memory_that_is_stated(algorithm: SecondOrder, outputs: tuple[int, int]) -> None:
    """Of operations; what libraries take inside of one is a part of the rest of the estimate."""
    rng = np.random.default_rng(7)
    groups = [
        [replace(x, asymmetric=0.5) for x in group(rng, moved(rng), outputs)] for _ in range(3)
    ]
    with Allocated() as allocated:
        algorithm.quantize_stack(groups, NVFP4(), torch.device("cpu"))
    stated = len(groups) * algorithm.stack_bytes(sum(outputs), WIDTH)
    assert 0.4 * stated < allocated.most < 0.9 * stated


@pytest.mark.gpu
def test_the_memory_that_is_stated_on_a_gpu() -> None:
    rng = np.random.default_rng(7)
    groups = [group(rng, own(rng), (400, 400)) for _ in range(40)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    GPTQJoint(descent=1).quantize_stack(groups, NVFP4(), torch.device("cuda"))
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < len(groups) * GPTQJoint().stack_bytes(800, WIDTH)


def test_nan_is_an_error_that_names_the_weight() -> None:
    rng = np.random.default_rng(6)
    groups = [group(rng, own(rng)) for _ in range(2)]
    broken_OI = groups[1][1].matrix_OI.clone()
    broken_OI[3, 5] = torch.nan
    groups[1][1] = replace(groups[1][1], matrix_OI=broken_OI)
    with pytest.raises(NonFiniteError, match="w1"):
        GPTQJoint().quantize_stack(groups, NVFP4(), torch.device("cpu"))

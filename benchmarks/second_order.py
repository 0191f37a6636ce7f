# SPDX-License-Identifier: Apache-2.0
"""How fast second moments, their factors, and rounding by them are.

    python benchmarks/second_order.py

One thread. The steps take turns, round after round, so that a noisy machine is noisy for all of
them, and are timed by the CPU time of the thread; reported are medians. Beside each step stands its
ratio to a baseline that ran in the same rounds: a float32 matrix product of the same width, or the
kernel of `mse`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fourfold.formats import nvfp4
from fourfold.formats.nvfp4 import block_scales, joint_cpu
from fourfold.formats.nvfp4.inverse_factor import inverse_factor
from fourfold.formats.nvfp4.second_order import TILE, Moment, Rounded, descend
from fourfold.statistics import SecondMoment, Site

Steps = dict[str, tuple[Callable[[], object], float, str]]
"""Name -> what to do, how much of it there is, and the unit of 10⁹ of that a second."""


def inputs(rows: int, width: int, seed: int = 0) -> Tensor:
    """Inputs `[rows, width]` that depend on each other, of uneven energy."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.eye(width) + 0.3 * torch.randn(width, width, generator=draw) / width**0.5
    energy = torch.exp(0.5 * torch.randn(width, generator=draw))
    return torch.randn(rows, width, generator=draw) @ mixing * energy


def lapack(h_II: Tensor) -> Tensor:
    lower = torch.linalg.cholesky(h_II.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(lower, torch.eye(len(h_II)), upper=True)


def factor_steps(width: int) -> Steps:
    x_RI = inputs(2 * width, width)
    h_II = Moment(x_RI.T @ x_RI / len(x_RI), 0.01).h_II
    a_II, flop = h_II.clone(), 2 * width**3
    return {
        "matrix product": (lambda: a_II @ h_II, flop, "GFLOP/s"),
        "U by LAPACK": (lambda: lapack(h_II), flop / 3, "GFLOP/s"),
        "U": (lambda: inverse_factor(h_II), flop / 3, "GFLOP/s"),
    }


def moment_steps(width: int, rows: int) -> Steps:
    x_RI, statistic = inputs(rows, width), SecondMoment()
    state = statistic.new(Site("x", width))
    flop = 2 * rows * width**2
    return {
        "matrix product": (lambda: x_RI.T @ x_RI, flop, "GFLOP/s"),
        f"second moment of {rows} rows": (lambda: statistic.update(state, x_RI, None), flop,
                                          "GFLOP/s (of the whole product)"),
    }  # fmt: skip


def weight_steps(outputs: int, width: int) -> Steps:
    """Every way to choose scales and codes of a weight, without the factor of its moment."""
    x_RI = inputs(2 * width, width)
    moment = Moment(x_RI.T @ x_RI / len(x_RI), 0.01).prepare()
    w_OI = torch.randn(outputs, width, generator=torch.Generator().manual_seed(1)) * 0.02
    group_scale, unit = block_scales.group_scale_and_unit(float(w_OI.abs().max()), 256)
    w_OI, group_scale = w_OI / unit, group_scale / unit
    codes = torch.empty(outputs, width // 2, dtype=torch.uint8)
    scales = torch.empty(outputs, width // 16, dtype=torch.uint8)
    rounded = Rounded(w_OI, moment)

    def mse() -> None:
        nvfp4.quantize_into(w_OI, codes, scales, scale="mse", global_scale=group_scale)

    def static() -> None:
        rounded.round(group_scale, rounded.static_scales(group_scale))

    def joint(sweeps: int) -> None:
        rounded.round(group_scale)
        descend([rounded], group_scale, sweeps)

    h_BKK, energy_I = moment.blocks_BKK, x_RI.square().mean(dim=0)
    steps: dict[str, Callable[[], object]] = {
        "mse": mse,
        "4/6": lambda: block_scales.four_or_six(w_OI, group_scale),
        "mse_weighted": lambda: block_scales.by_energy(w_OI, energy_I, group_scale),
        "local_hessian": lambda: block_scales.by_form(w_OI, h_BKK, group_scale),
        "gptq": static,
        "gptq_joint": lambda: joint(0),
        "a tile of it": lambda: tile(rounded, group_scale),
        "gptq_joint, 2 sweeps": lambda: joint(2),
    }
    counts = dict.fromkeys(steps, outputs * width) | {"a tile of it": outputs * TILE}
    return {name: (step, counts[name], "G weights/s") for name, step in steps.items()}


def tile(rounded: Rounded, group_scale: float) -> None:
    tile_OW = rounded.target_OI[:, :TILE].contiguous()
    values_OW, errors_OW = torch.empty_like(tile_OW), torch.empty_like(tile_OW)
    joint_cpu.round_tile(
        tile_OW.numpy(),
        rounded.moment.factor_II[:TILE, :TILE].contiguous().numpy(),
        np.float32(group_scale),
        False,
        torch.empty_like(tile_OW, dtype=torch.uint8).numpy(),
        torch.empty(len(tile_OW), TILE // 16, dtype=torch.uint8).numpy(),
        values_OW.numpy(),
        errors_OW.numpy(),
    )


def report(title: str, steps: Steps, rounds: int) -> None:
    """Print the rate of each step, and its time as a multiple of the first one's."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, (step, _, _) in steps.items():
            begun = time.process_time()
            step()
            if number:  # the first round compiles and warms up
                seconds[name].append(time.process_time() - begun)
    baseline = next(iter(steps))
    print(f"{title}\n")
    for name, (_, amount, unit) in steps.items():
        median = statistics.median(seconds[name])
        ratios = [a / b for a, b in zip(seconds[name], seconds[baseline], strict=True)]
        rate = amount / median / 1e9
        print(f"  {name:32} {rate:9.4f} {unit}, {statistics.median(ratios):7.2f} × {baseline}")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for width in (512, 2048, 4096):
        report(f"factor, width {width}", factor_steps(width), rounds)
    for width, rows in ((512, 64), (512, 2048), (2048, 64), (2048, 2048)):
        report(f"second moment, width {width}", moment_steps(width, rows), rounds)
    for outputs, width in ((512, 2048), (2048, 512)):
        title = f"weight [{outputs}, {width}], its moment factored before"
        report(title, weight_steps(outputs, width), rounds)


if __name__ == "__main__":
    main()

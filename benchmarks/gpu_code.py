# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels compile to, without a GPU: `python benchmarks/gpu_code.py`.

Compiles the search for a GPU that need not be there, disassembles it with the tools that come with
Triton, and counts the instructions of each part: registers, the loops over candidates, the packing.
From these counts and the number of candidates that a tile of 32 Gaussian blocks tries, it estimates
the time of a weight on an H200, as if every scheduler issued an instruction at each cycle. An
estimate, not a measurement: `gpu_sweep.py` measures.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fourfold.formats.nvfp4 import sweep, sweep_cuda

SCHEDULERS, CLOCK = 132 * 4, 1.755e9  # of an H200, below its boost clock of 1.98 GHz
BLOCKS = 8192 * 4096 // 16
BELOW = 1.16  # candidates below FIRST that 32 Gaussian blocks try together, at most of them
TYPES = {
    "words": "*i64",
    "global_scales": "*fp32",
    "codes": "*i64",
    "scales": "*u8",
    "losses": "*fp64",
    "energies": "*fp64",
    "blocks": "i32",
}


def compile_search(capability: int, algorithm: int, kind: int, packs: bool, tile: int, warps: int):
    """The compiled kernel: `.asm` holds "ptx" and "cubin"."""
    constants = {"ALGORITHM": algorithm, "KIND": kind, "PACK": packs, "FMA": True, "TILE": tile}
    source = ASTSource(
        sweep_cuda.quantize_kernel,
        TYPES | dict.fromkeys(constants, "constexpr"),
        constants,
        {(index,): [["tt.divisibility", 16]] for index in range(6)},
    )
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def disassemble(kernel) -> tuple[str, str]:
    """The instructions, and what they take."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        return tuple(
            subprocess.run(
                [tools / "cuobjdump", option, file.name], check=True, capture_output=True, text=True
            ).stdout
            for option in ("-sass", "-res-usage")
        )


def instructions(sass: str) -> list[tuple[int, str]]:
    """(address, text) of each."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass, re.M)
    return [(int(address, 16), text) for address, text in found]


def loops(code: list[tuple[int, str]]) -> list[Counter[str]]:
    """The operations of each innermost loop: from where a branch leads back to, to the branch."""
    found = []
    for address, text in code:
        target = re.search(r"BRA.* (0x[0-9a-f]+)", text)
        if target and (begin := int(target[1], 16)) < address:
            found.append((begin, address))
    inner = [
        loop
        for loop in found
        if not any(other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in found)
    ]
    return [
        Counter(operation(text) for at, text in code if begin <= at <= end) for begin, end in inner
    ]


def operation(text: str) -> str:
    return re.sub(r"^@!?U?P\w+ ", "", text).split()[0].split(".")[0]


def estimate(code: list[tuple[int, str]], algorithm: int) -> float:
    """Instructions of a warp for 32 blocks: what lies outside of loops (down to the end; the slow
    ways of divisions lie beyond), and the loops as often as Gaussian blocks go through them."""
    end = next(at for at, text in code if operation(text) == "EXIT" and "@" not in text)
    sizes = [sum(loop.values()) for loop in loops(code) if sum(loop.values()) > 40]
    straight = sum(at <= end for at, _ in code) - sum(sizes)
    if algorithm == sweep.MAX:
        return straight
    above, below, _ = sizes
    if algorithm == sweep.MSE_FULL:
        return straight + 126 * below
    return straight + 8 * above + BELOW * below


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--tile", type=int, default=32)
    parser.add_argument("--warps", type=int, default=1)
    options = parser.parse_args()
    shape = options.tile, options.warps
    print(f"torch {torch.__version__}, triton {triton.__version__}, sm_{options.capability}")
    for name, algorithm in (("pruned", sweep.MSE), ("full", sweep.MSE_FULL), ("max", sweep.MAX)):
        for packs in (True, False):
            kernel = compile_search(options.capability, algorithm, sweep.BFLOAT16, packs, *shape)
            sass, usage = disassemble(kernel)
            registers = re.search(r"REG:(\d+)", usage)[1]
            spilled = re.search(r"LOCAL:(\d+)", usage)[1]
            code = instructions(sass)
            print(
                f"\n{name}, {'codes and scales' if packs else 'scales alone'}: "
                f"{len(code)} instructions, {registers} registers, {spilled} bytes spilled"
            )
            executed = estimate(code, algorithm)
            microseconds = executed * BLOCKS / 32 / (SCHEDULERS * CLOCK) * 1e6
            print(f"  32 blocks: {executed:,.0f}; 8192 x 4096 on an H200: {microseconds:,.0f} µs")
            for loop in loops(code):
                if sum(loop.values()) > 40:
                    parts = ", ".join(f"{n} {what}" for what, n in loop.most_common(6))
                    print(f"  a loop of {sum(loop.values())}: {parts}")


if __name__ == "__main__":
    main()

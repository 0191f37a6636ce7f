# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel for NVIDIA GPUs that need not be there, and prints what to look at
as JSON. Run in a process of its own: the tests' process has Triton's interpreter instead."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fourfold.formats.fp8 import FIGURES, kernels_cuda
from fourfold.formats.nvfp4 import stream_cuda, sweep, sweep_cuda

SEARCH = {
    "words": "*i64",
    "global_scales": "*fp32",
    "codes": "*i64",
    "scales": "*u8",
    "losses": "*fp64",
    "energies": "*fp64",
    "blocks": "i32",
}
AMAX = {"words": "*i64", "result": "*i32", "count": "i32"}
DEQUANTIZE = {
    "codes": "*i16",
    "scales": "*u8",
    "global_scale": "fp32",
    "out": "*i64",
    "count": "i32",
}
FP8 = {
    "x": "*i16",
    "scales": "*fp32",
    "codes": "*u8",
    "exponents": "*u8",
    "errors": "*fp64",
    "energies": "*fp64",
    "blocks": "i32",
    "figures": "i32",
}
FAKE = {"x": "*i16", "input_scale": "fp32", "out": "*i16", "blocks": "i32"}


def kernels():
    """(name, kernel, types, constants, warps)"""
    for algorithm in (sweep.MAX, sweep.MSE, sweep.MSE_FULL):
        for kind in (sweep.BFLOAT16, sweep.FLOAT16, sweep.FLOAT32):
            for tile, warps in ((32, 1), (128, 2)):
                constants = {"ALGORITHM": algorithm, "KIND": kind, "PACK": True, "FMA": True}
                name = f"quantize {algorithm} {kind} {tile}"
                yield name, sweep_cuda.quantize_kernel, SEARCH, constants | {"TILE": tile}, warps
    # Triton compiles a kernel anew where a number is 1.
    types = {name: kind for name, kind in SEARCH.items() if name != "blocks"}
    constants = {"blocks": 1, "ALGORITHM": sweep.MSE, "KIND": 0, "PACK": False, "FMA": True}
    yield "quantize one", sweep_cuda.quantize_kernel, types, constants | {"TILE": 32}, 1
    for kind in (sweep.BFLOAT16, sweep.FLOAT32):
        constants = {"KIND": kind, "TILE": 4096}
        yield f"amax {kind}", stream_cuda.amax_kernel, AMAX, constants, 4
        types = FAKE if kind == sweep.BFLOAT16 else FAKE | {"x": "*i32", "out": "*i32"}
        constants = {"KIND": kind, "TILE": 128}
        yield f"fake {kind}", stream_cuda.fake_quantize_kernel, types, constants, 4
        is_bf16 = kind == sweep.BFLOAT16
        types = DEQUANTIZE if is_bf16 else DEQUANTIZE | {"codes": "*u8"}
        constants = {"IS_BF16": is_bf16, "TILE": 1024}
        yield f"dequantize {kind}", stream_cuda.dequantize_kernel, types, constants, 4
        types = FP8 if is_bf16 else FP8 | {"x": "*i32"}
        for is_mx, width in ((False, 16), (True, 32)):
            constants = {"KIND": kind, "MX": is_mx, "WIDTH": width, "TILE": FIGURES // width}
            yield f"fp8 {is_mx} {kind}", kernels_cuda.quantize_kernel, types, constants, 4


def compiled(kernel, types, constants, warps, capability):
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin: bytes) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [tools / "cuobjdump", "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    pattern, *capabilities = sys.argv[1:]
    found = {}
    for capability in map(int, capabilities):
        for name, kernel, types, constants, warps in kernels():
            if not re.search(pattern, name):
                continue
            made = compiled(kernel, types, constants, warps, capability)
            usage = resources(made.asm["cubin"])
            found[f"sm_{capability} {name}"] = {
                "flushes": len(re.findall(r"\.ftz", made.asm["ptx"])),
                "fused_doubles": len(re.findall(r"fma\.rn\.f64", made.asm["ptx"])),
                "divisions": len(re.findall(r"div\.rn\.f32|rcp\.rn\.f32", made.asm["ptx"])),
                "fused": len(re.findall(r"fma\.rn\.f32", made.asm["ptx"])),
                "registers": int(re.search(r"REG:(\d+)", usage)[1]),
                "spilled": int(re.search(r"LOCAL:(\d+)", usage)[1]),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

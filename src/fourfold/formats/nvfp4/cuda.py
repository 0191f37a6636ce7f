# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels, called with tensors: chooses memory layouts, grids and tiles.

Any thread may call them, but one launches at a time. A launch takes microseconds, except the
first, for which Triton compiles and loads the kernel: without the lock, Triton could hand out a
kernel that is not loaded yet.

Import this module only through `nvfp4` and `activations`, at first use: it imports Triton. Only
`tune` and `quantize_matrix` wait for the device. With TRITON_INTERPRET set when Triton is imported,
kernels are interpreted, on tensors in CPU memory.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from fourfold.formats.nvfp4 import stream_cuda, sweep, sweep_cuda

INTERPRETED = bool(triton.knobs.runtime.interpret)
HAS_FMA = not INTERPRETED
"""True if `tl.fma` fuses; the interpreter multiplies and adds."""

TILES = ((32, 1), (64, 1), (64, 2), (128, 2), (128, 4))
"""The tile sizes that `tune` times: blocks of a tile, and the warps that process them."""

DEFAULT_TILE = (32, 1)
"""The tile that is used untuned: it wastes the fewest registers, and its loops end once 32 blocks
agree. This was found by counting instructions (`benchmarks/NOTES.md`), not by measuring."""

_MOST_WEIGHTS = 65535  # of a grid's second dimension
_AMAX_WORDS, _DEQUANTIZE_WORDS, _FAKE_BLOCKS = 4096, 1024, 128
_MANY_WORDS = 1 << 16  # the interpreter has no threads, but wide vectors
_launching = threading.RLock()
_tuned: dict[tuple[int | None, int, int, bool], tuple[int, int]] = {}


def amaxes(weight_NX: Tensor) -> Tensor:
    """Return each weight's largest magnitude, float32 [N]; not finite if it holds Inf or NaN."""
    w_NX = _aligned(weight_NX)
    words_NW = w_NX.view(torch.int64)
    count, tile = words_NW.shape[1], _MANY_WORDS if INTERPRETED else _AMAX_WORDS
    result_N = torch.zeros(len(w_NX), dtype=torch.int32, device=w_NX.device)
    kind = sweep.KINDS[w_NX.dtype]
    with launching(w_NX):
        for some in grids(len(w_NX)):
            grid = (triton.cdiv(count, tile), some.stop - some.start)
            stream_cuda.amax_kernel[grid](words_NW[some], result_N[some], count, kind, tile)
    if kind == sweep.FLOAT32:
        return result_N.view(torch.float32)
    return result_N.to(torch.int16).view(w_NX.dtype).float()


def quantize(
    weight_NX: Tensor,
    codes_out: Tensor | None,
    block_scale_out: Tensor,
    global_scales: Tensor,
    algorithm: int,
    workspace: Tensor | None = None,
) -> Tensor:
    """Fill uint8 codes [N, X/2], unless None, and block scales [N, X/16] of N weights, float32
    global_scales [N]; `algorithm` is one of sweep's. workspace: `nvfp4.workspace_bytes` of it.

    Returns Σ(w − q·s·S)² and Σw², float64 [N, 2]. Where one is not finite, the bytes are void.
    """
    w_NX = _aligned(weight_NX)
    count, blocks = len(w_NX), w_NX.shape[1] // 16
    scales = own(block_scale_out, 1)
    codes = scales if codes_out is None else own(codes_out, 8)
    if workspace is None:
        parts = triton.cdiv(blocks, sweep_cuda.FIGURES.value)
        workspace = torch.empty(16 * count * parts, dtype=torch.uint8, device=w_NX.device)
    losses, energies = workspace.view(torch.float64).view(2, count, -1)
    kind, packs = sweep.KINDS[w_NX.dtype], codes_out is not None
    tile, warps = _tuned.get((w_NX.device.index, algorithm, kind, packs), DEFAULT_TILE)
    if INTERPRETED:
        tile = min(_MANY_WORDS // 16, max(32, triton.next_power_of_2(blocks)))
    words, s_N = w_NX.view(torch.int64), global_scales.to(w_NX.device).contiguous()
    with launching(w_NX):
        for some in grids(count):
            sweep_cuda.quantize_kernel[(triton.cdiv(blocks, tile), some.stop - some.start)](
                words[some],
                s_N[some],
                codes[some].view(torch.int64) if packs else scales,
                scales[some],
                losses[some],
                energies[some],
                blocks,
                ALGORITHM=algorithm,
                KIND=kind,
                PACK=packs,
                FMA=HAS_FMA,
                TILE=tile,
                num_warps=warps,
                enable_fp_fusion=False,
            )
    if scales is not block_scale_out:
        block_scale_out.copy_(scales)
    if codes_out is not None and codes is not codes_out:
        codes_out.copy_(codes)
    return torch.stack((losses.sum(dim=1), energies.sum(dim=1)), dim=1)


def quantize_matrix(
    weight_OI: Tensor,
    codes_out: Tensor,
    block_scale_out: Tensor,
    global_scale: float,
    algorithm: int,
) -> tuple[float, float]:
    """`quantize` of one weight [O, I] into buffers of any stride. Waits for the device."""
    w_1X, codes, scales = (x.reshape(1, -1) for x in (weight_OI, codes_out, block_scale_out))
    s_1 = torch.tensor([global_scale], dtype=torch.float32, device=weight_OI.device)
    error, energy = quantize(w_1X, codes, scales, s_1, algorithm)[0].tolist()
    for filled, out in ((codes, codes_out), (scales, block_scale_out)):
        if filled.data_ptr() != out.data_ptr():
            out.copy_(filled.view(out.shape))
    return error, energy


def dequantize(codes: Tensor, scales: Tensor, global_scale: float, out: Tensor) -> None:
    """The weight of codes and scales, bytes of any kind, into contiguous float32 or bf16."""
    is_bf16 = out.dtype == torch.bfloat16
    codes = _aligned(codes.reshape(1, -1))
    words = codes.view(torch.int16 if is_bf16 else torch.uint8)
    buffer = own(out.view(1, -1), 8)
    count, tile = words.numel(), _MANY_WORDS if INTERPRETED else _DEQUANTIZE_WORDS
    if count:
        with launching(codes):
            stream_cuda.dequantize_kernel[(triton.cdiv(count, tile),)](
                words,
                scales.contiguous(),
                global_scale,
                buffer.view(torch.int64),
                count,
                is_bf16,
                tile,
                enable_fp_fusion=False,
            )
    if buffer.data_ptr() != out.data_ptr():
        out.copy_(buffer.view(out.shape))


def fake_quantize(x: Tensor, input_scale: float, out: Tensor) -> None:
    """x̂ of activations [.., in] into a contiguous tensor like them."""
    integer = torch.int32 if x.dtype == torch.float32 else torch.int16
    blocks, tile = x.numel() // 16, _MANY_WORDS // 16 if INTERPRETED else _FAKE_BLOCKS
    if blocks:
        with launching(x):
            stream_cuda.fake_quantize_kernel[(triton.cdiv(blocks, tile),)](
                x.contiguous().view(integer),
                input_scale,
                out.view(integer),
                blocks,
                sweep.KINDS[x.dtype],
                tile,
                enable_fp_fusion=False,
            )


def tune(device: torch.device, dtype: torch.dtype, algorithm: int, packs: bool = True) -> None:
    """Compile the kernel for all `TILES`, time them, and let later calls use the fastest.

    It takes some seconds the first time on a machine (Triton caches what it compiled) and a quarter
    of a GB of the device's memory, and waits for the device. If there is no room, the default tile
    stays. Call it before other threads use the kernels.
    """
    if device.type == "cuda" and device.index is None:  # as tensors on it name it
        device = torch.device("cuda", torch.cuda.current_device())
    key = (device.index, algorithm, sweep.KINDS[dtype], packs)
    if INTERPRETED or key in _tuned:
        return
    try:
        with torch.cuda.device(device):
            _tuned[key] = _fastest(key, device, dtype)
    except RuntimeError as error:  # PyTorch and Triton have their own words for it
        _tuned[key] = DEFAULT_TILE
        if "out of memory" not in str(error).lower():
            raise
    finally:
        torch.cuda.empty_cache()


def _fastest(
    key: tuple[int | None, int, int, bool], device: torch.device, dtype: torch.dtype
) -> tuple[int, int]:
    generator = torch.Generator(device).manual_seed(0)
    w_NX = torch.randn(64, 1 << 19, generator=generator, device=device).to(dtype)
    scales = torch.empty(64, 1 << 15, dtype=torch.uint8, device=device)
    codes = torch.empty(64, 1 << 18, dtype=torch.uint8, device=device) if key[3] else None
    s_N = amaxes(w_NX) / 2688
    milliseconds: dict[tuple[int, int], float] = {}
    for choice in TILES:
        _tuned[key] = choice
        milliseconds[choice] = _median(lambda: quantize(w_NX, codes, scales, s_N, key[1]))
    return min(milliseconds, key=milliseconds.__getitem__)


def _median(work: Callable[[], Any]) -> float:
    """Milliseconds of eight calls, the median of five times. As a graph: Python would take longer
    than the device, all the more where another thread is busy."""
    work()
    graph = torch.cuda.CUDAGraph()
    api: Any = torch.cuda
    own = api.Stream()  # what PyTorch would take is of the device that was captured first
    with torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):
        for _ in range(8):
            work()
    graph.replay()
    times = []
    for _ in range(5):
        begin, end = (api.Event(enable_timing=True) for _ in "be")
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)))
    return statistics.median(times)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and at an address that 8 divides: a copy only if it is not."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.data_ptr() % 8 == 0 else tensor.clone()


def own(buffer: Tensor, alignment: int) -> Tensor:
    """Return the buffer, or a new one like it if the kernels cannot write to it."""
    fits = buffer.is_contiguous() and buffer.data_ptr() % alignment == 0
    return buffer if fits else torch.empty_like(buffer, memory_format=torch.contiguous_format)


@contextmanager
def launching(tensor: Tensor, *kernels: Any) -> Iterator[None]:
    """Make the tensor's device current and keep other threads from launching.

    kernels: Those that are launched, where they are none of this package.
    """
    device = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
    with _launching, device:
        try:
            yield
        except BaseException:
            _forget(kernels)
            raise


def _forget(kernels: Iterable[Any]) -> None:
    """Let Triton load its kernels again, from its cache on disk. A kernel for which there was no
    memory when it was loaded would otherwise stay in that state, and could never be launched."""
    for kernel in (
        sweep_cuda.quantize_kernel,
        stream_cuda.amax_kernel,
        stream_cuda.dequantize_kernel,
        stream_cuda.fake_quantize_kernel,
        *kernels,
    ):
        getattr(kernel, "device_caches", {}).clear()  # the interpreter has none


def grids(count: int) -> list[slice]:
    """Return the runs of weights that one launch each can take."""
    starts = range(0, count, _MOST_WEIGHTS)
    return [slice(start, min(start + _MOST_WEIGHTS, count)) for start in starts]

# SPDX-License-Identifier: Apache-2.0
"""Weights that are quantized on a device: the CPU's bytes, in the memory that was allowed, whatever
goes wrong there.

No GPU is needed: the device's way runs on the CPU as well, where streams are nothing, pinned memory
is any memory, and numba's kernels stand for Triton's. What needs a GPU is at the end.
"""

from __future__ import annotations

import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fourfold
from executing import assert_same_shards, execute
from families import FAMILIES, Truth
from fourfold.config import OutputConfig, Runtime
from fourfold.events import BackendChosen, Event, Resumed, ShardWritten, WarningIssued
from fourfold.execution import backend, streams
from fourfold.execution import gpu as gpu_backend
from fourfold.execution.streams import FEWEST_SETS, MOST_SETS, ROOM, BufferPool
from fourfold.formats import dispatch, nvfp4
from fourfold.formats.dispatch import Choice, Kernel
from fourfold.planning import Limits
from fourfold.sources.safetensors import SafetensorsFolder
from jobs import W4A4, W4A16, assert_same, flat, ids_file, only

Written = Callable[[str], tuple[Path, Truth]]
DEFAULT = "w4a16_nvfp4_default_mse"

LAYOUTS = ["mixtral", "qwen3_5_moe", "gpt_oss", "llama4", "deepseek_v3"]
"""One by one, fused, transposed, interleaved, with biases; attention that shares its scales."""


@pytest.fixture
def on_gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is quantized goes to a device, which is the CPU."""
    monkeypatch.setattr(backend, "uses_device", lambda choice: True)


@contextmanager
def on_host() -> Iterator[None]:
    """Within, the CPU quantizes as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "uses_device", lambda choice: False)
        yield


@pytest.fixture(scope="module")
def host_made(tmp_path_factory: pytest.TempPathFactory, written: Written) -> Callable[..., Path]:
    """What the CPU makes of a family with a recipe."""

    @cache
    def make(name: str, recipe: str) -> Path:
        out = tmp_path_factory.mktemp("host") / "out"
        with on_host():
            fourfold.quantize(
                written(name)[0],
                out,
                recipe,
                runtime=Runtime(threads=2),
                output=OutputConfig(verify=False),
            )
        return out

    return make


class Counted:
    """Counts calls of a function of the device's way, and can make some of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
        self.calls: list[int] = []
        """How many weights each was called with; 1 for what has none. Not they themselves: whether
        their memory is given back is a question here."""
        self.fails: Callable[[int, Any], Exception | None] = lambda number, arguments: None
        self._call, self._lock = getattr(where, name), threading.Lock()
        monkeypatch.setattr(where, name, self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        first = arguments[0]
        with self._lock:
            self.calls.append(len(first) if isinstance(first, torch.Tensor) else 1)
            number = len(self.calls)
        error = self.fails(number, arguments)
        if error is not None:
            raise error
        return self._call(*arguments, **options)


def quantized(model: Path, out: Path, recipe: str = W4A16, **options: Any) -> fourfold.Result:
    options = {"threads": 2, "verify": False, "device": "cpu", **options}
    return fourfold.quantize(model, out, recipe, **flat(**options))


@pytest.mark.usefixtures("on_gpu_path")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("memory", [None, 200_000, 20_000])
def test_the_bytes_of_the_cpu(
    name: str, memory: int | None, written: Written, host_made: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All of a shard at a time; some groups at a time; groups that go row by row."""
    batches = Counted(monkeypatch, nvfp4, "quantize_batch_into")
    by_rows = Counted(monkeypatch, gpu_backend, "GPUKernels")
    result = quantized(written(name)[0], tmp_path / "out", DEFAULT, device_memory=memory)
    assert_same(tmp_path / "out", host_made(name, DEFAULT))
    assert result.warnings == ()
    if memory is None:
        assert len(batches.calls) < len(result.plan.groups)
    assert sum(batches.calls) >= len(result.linears)
    assert bool(by_rows.calls) == (memory == 20_000)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels are compiled here")
def test_the_bytes_of_the_cpu_by_interpreted_kernels(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own kernels, as its interpreter runs them."""
    pytest.importorskip("triton")
    recipe = "w4a16_nvfp4_experts_only"
    quantized(written("gpt_oss")[0], tmp_path / "host", recipe)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    result = quantized(written("gpt_oss")[0], tmp_path / "out", recipe)
    assert result.kernels.startswith("triton kernels")
    assert_same_shards(tmp_path / "out", tmp_path / "host")


@pytest.mark.slow
@pytest.mark.usefixtures("on_gpu_path")
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "jetmoe"])
@pytest.mark.parametrize("memory", [None, 20_000])
def test_the_bytes_of_the_cpu_for_every_family(
    name: str, memory: int | None, written: Written, host_made: Callable[..., Path], tmp_path: Path
) -> None:
    quantized(written(name)[0], tmp_path / "out", DEFAULT, device_memory=memory)
    assert_same(tmp_path / "out", host_made(name, DEFAULT))


@pytest.mark.usefixtures("on_gpu_path")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    from families import write_checkpoint

    write_checkpoint(FAMILIES["qwen3_5_moe"], tmp_path / "model", dtype=dtype, shards=3)
    for memory in (None, 20_000):
        quantized(tmp_path / "model", tmp_path / f"{memory}", DEFAULT, device_memory=memory)
    with on_host():
        quantized(tmp_path / "model", tmp_path / "host", DEFAULT)
    assert_same(tmp_path / "None", tmp_path / "host")
    assert_same(tmp_path / "20000", tmp_path / "host")


@pytest.mark.usefixtures("on_gpu_path")
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_w4a4(name: str, written: Written, tmp_path: Path) -> None:
    """Weights come out of the layers that calibration holds, and have input scales."""
    options = {"calib": [ids_file(tmp_path)], "calib_seq": 24, "calib_size": 4, "threads": 1}
    quantized(written(name)[0], tmp_path / "out", W4A4, **options)
    with on_host():
        quantized(written(name)[0], tmp_path / "host", W4A4, **options)
    assert_same(tmp_path / "out", tmp_path / "host")


@pytest.mark.usefixtures("on_gpu_path")
def test_a_model_in_memory(written: Written, tmp_path: Path) -> None:
    from families import read_back

    model, _ = read_back(FAMILIES["qwen3_moe"], written("qwen3_moe")[0])
    quantized(model, tmp_path / "out")  # type: ignore[arg-type]
    with on_host():
        quantized(model, tmp_path / "host")  # type: ignore[arg-type]
    assert_same(tmp_path / "out", tmp_path / "host")


@pytest.mark.usefixtures("on_gpu_path")
def test_groups_that_the_host_reads_in_pieces(
    written: Written, host_made: Callable[..., Path], tmp_path: Path
) -> None:
    model, limits = written("deepseek_v3")[0], Limits(group_bytes=2048)
    pool = BufferPool(torch.device("cpu"), 8_000, 4)
    execute(model, tmp_path / "out", DEFAULT, limits, pool=pool)
    assert_same_shards(tmp_path / "out", host_made("deepseek_v3", DEFAULT))


@pytest.mark.usefixtures("on_gpu_path")
def test_one_launch_for_experts_of_one_size(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Counted(monkeypatch, nvfp4, "quantize_batch_into")
    result = quantized(written("mixtral")[0], tmp_path / "out")
    assert batches.calls == [12, 12, 12]  # layers, whole
    assert len(result.linears) == 36


@pytest.mark.usefixtures("on_gpu_path")
@pytest.mark.parametrize("memory", [20_000, 60_000, 200_000])
@pytest.mark.parametrize("runs_out", [False, True])
def test_no_more_memory_than_was_allowed(
    runs_out: bool, memory: int, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All buffers there together; and once they are there, no more are allocated.

    What an error has left of a buffer is gone before there is another one.
    """
    live, most, made = [0], [0], [0]
    lock = threading.Lock()
    call = Counted(monkeypatch, nvfp4, "quantize_batch_into")
    if runs_out:
        call.fails = lambda number, _: out_of_memory(number) if number % 4 == 0 else None

    def drop(nbytes: int) -> None:
        with lock:
            live[0] -= nbytes

    def counted(target: torch.device, nbytes: int) -> torch.Tensor:
        buffer = np.empty(nbytes, np.uint8)  # lives as long as any view of the tensor
        weakref.finalize(buffer, drop, nbytes)
        with lock:
            live[0] += nbytes
            most[0] = max(most[0], live[0])
            made[0] += 1
        return torch.from_numpy(buffer)

    monkeypatch.setattr(streams, "on_device", counted)
    quantized(written("gpt_oss")[0], tmp_path / "out", DEFAULT, device_memory=memory, threads=8)
    assert 0 < most[0] <= memory
    assert runs_out or made[0] <= MOST_SETS


def test_buffer_sets_and_their_room() -> None:
    cpu = torch.device("cpu")
    large = BufferPool(cpu, 1 << 40, 64)
    assert (large.count, large.room) == (MOST_SETS, ROOM)
    assert BufferPool(cpu, 1 << 40, 3).count == 3
    assert (BufferPool(cpu, 3 * ROOM, 64).count, BufferPool(cpu, 3 * ROOM, 64).room) == (3, ROOM)
    small = BufferPool(cpu, ROOM, 64)
    assert (small.count, small.room, small.nbytes) == (FEWEST_SETS, ROOM // 2, ROOM)
    assert BufferPool(cpu, 3 * ROOM - 2, 64).pinned_bytes == 2 * ROOM  # as PyTorch rounds it


def out_of_memory(number: int) -> Exception:
    """As PyTorch's allocator says it, CUDA, and Triton, in turn."""
    return [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ][number % 3]


MOMENTS = [
    (streams, "on_device"),
    (streams, "pinned"),
    (nvfp4, "amaxes"),
    (nvfp4, "quantize_batch_into"),
]


@pytest.mark.usefixtures("on_gpu_path")
@pytest.mark.parametrize(("where", "name"), MOMENTS)
@pytest.mark.parametrize("first", [1, 2])
def test_out_of_memory_once(
    where: Any, name: str, first: int, written: Written, host_made: Callable[..., Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The batch is done again in halves, and everyone's is smaller from then on."""
    call = Counted(monkeypatch, where, name)
    call.fails = lambda number, _: out_of_memory(first) if number == first else None
    result = quantized(written("gpt_oss")[0], tmp_path / "out", W4A16)
    assert_same(tmp_path / "out", host_made("gpt_oss", W4A16))
    (warning,) = result.warnings
    assert warning.startswith("cpu: out of memory: weights go there in batches of ")
    assert len(call.calls) > first


@pytest.mark.usefixtures("on_gpu_path")
def test_out_of_memory_until_it_fits(
    written: Written, host_made: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Four weights fit, and no more: they still go there, and nothing is asked for twice."""
    call = Counted(monkeypatch, nvfp4, "quantize_batch_into")
    call.fails = lambda number, given: out_of_memory(number) if len(given[0]) > 4 else None
    result = quantized(written("mixtral")[0], tmp_path / "out", threads=1)
    assert_same(tmp_path / "out", host_made("mixtral", W4A16))
    assert len(result.warnings) == 1
    fitted = [count for count in call.calls if count <= 4]
    assert sum(fitted) == 36
    assert max(fitted) > 1


@pytest.mark.usefixtures("on_gpu_path")
@pytest.mark.parametrize(("where", "name"), MOMENTS)
def test_never_enough_memory(
    where: Any, name: str, written: Written, host_made: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The CPU does it then, and both is said, once."""
    Counted(monkeypatch, where, name).fails = lambda number, _: out_of_memory(number)
    result = quantized(written("gpt_oss")[0], tmp_path / "out")
    assert_same(tmp_path / "out", host_made("gpt_oss", W4A16))
    left, halved = sorted(result.warnings, key=len, reverse=True)
    assert "out of memory: weights go there in batches" in halved
    assert left.startswith("cpu: out of memory: model.layers.")
    assert "are quantized on the CPU. The output is the same." in left


@pytest.mark.usefixtures("on_gpu_path")
def test_other_errors_of_the_device_end_the_run(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Counted(monkeypatch, nvfp4, "quantize_batch_into")
    call.fails = lambda number, _: RuntimeError("CUDA error: an illegal memory access")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        quantized(written("mixtral")[0], tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.usefixtures("on_gpu_path")
def test_too_little_for_a_row(
    written: Written, host_made: Callable[..., Path], tmp_path: Path
) -> None:
    result = quantized(written("mixtral")[0], tmp_path / "out", device_memory=3_000)
    assert_same(tmp_path / "out", host_made("mixtral", W4A16))
    (warning,) = result.warnings
    assert "of its memory are too little: model.layers.0" in warning


@pytest.mark.usefixtures("on_gpu_path")
def test_figures_that_the_device_does_not_find(
    written: Written, host_made: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The CPU quantizes these weights: what the device wrote is void."""
    quantize = nvfp4.quantize_batch_into

    def unsure(*arguments: Any, **options: Any) -> torch.Tensor:
        figures = quantize(*arguments, **options)
        figures[::2, 0] = float("nan")
        arguments[1][::2] = 0
        return figures

    monkeypatch.setattr(nvfp4, "quantize_batch_into", unsure)
    for memory in (None, 20_000):
        out = tmp_path / f"{memory}"
        quantized(written("gpt_oss")[0], out, device_memory=memory)
        assert_same(out, host_made("gpt_oss", W4A16))


def edited(model: Path, folder: Path, name: str, change: Callable[[torch.Tensor], object]) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (key,) = (key for key in tensors if key.endswith(name))
    change(tensors[key])
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.usefixtures("on_gpu_path")
@pytest.mark.parametrize(
    ("family", "name", "place"),
    [
        ("mixtral", "layers.1.block_sparse_moe.experts.2.w3.weight", (5, 7)),
        ("gpt_oss", "layers.1.mlp.experts.gate_up_proj", (1, 3, 9)),
        ("qwen3_5_moe", "layers.2.mlp.experts.down_proj", (3, 20, 4)),
    ],
)
def test_errors_name_what_they_name_on_the_cpu(
    family: str, name: str, place: tuple[int, ...], written: Written, tmp_path: Path
) -> None:
    """Weight, key, file, position; wherever the weight is in a batch, and row by row."""

    def spoil(tensor: torch.Tensor) -> None:
        tensor[place] = float("nan" if family == "mixtral" else "-inf")

    model = edited(written(family)[0], tmp_path / "model", name, spoil)
    messages = []
    for memory in (None, 20_000):
        with pytest.raises(fourfold.FourfoldError) as caught:
            quantized(model, tmp_path / "out", device_memory=memory)
        messages.append(str(caught.value))
    with on_host(), pytest.raises(fourfold.FourfoldError) as caught:
        quantized(model, tmp_path / "out")
    assert messages == [str(caught.value)] * 2
    assert name in messages[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("on_gpu_path")
def test_a_weight_that_is_lost_is_refused(written: Written, tmp_path: Path) -> None:
    def outlier(tensor: torch.Tensor) -> None:
        tensor[0, 0] = 3e38

    name = "layers.1.block_sparse_moe.experts.0.w3.weight"
    model = edited(written("mixtral")[0], tmp_path / "model", name, outlier)
    with pytest.raises(fourfold.WeightLostError, match=r"experts\.0\.w1: lost in NVFP4: .*0\.w3, "):
        quantized(model, tmp_path / "out")


@pytest.mark.usefixtures("on_gpu_path")
def test_what_is_stopped_goes_on_wherever(
    written: Written, host_made: Callable[..., Path], tmp_path: Path
) -> None:
    """Begun on a device, gone on with on the CPU and on a device again: the same bytes."""
    model, out = written("qwen3_moe")[0], tmp_path / "out"
    options = {"shards": 4, "threads": 1}

    resumed: list[int] = []

    def stop(event: Event) -> None:
        if isinstance(event, Resumed):
            resumed.append(event.finished)
        if isinstance(event, ShardWritten) and event.shards_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(model, out, on_event=stop, **options)
    with on_host(), pytest.raises(KeyboardInterrupt):
        quantized(model, out, on_event=stop, **options)
    quantized(model, out, on_event=only(Resumed, lambda e: resumed.append(e.finished)), **options)
    assert len(resumed) == 2
    assert 2 <= resumed[0] < resumed[1]
    with on_host():
        quantized(model, tmp_path / "unbroken", shards=4)
    assert_same(out, tmp_path / "unbroken")


@pytest.mark.usefixtures("on_gpu_path")
def test_a_batch_on_its_way_does_not_stop_the_others(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first read takes until other batches were quantized and written."""
    others = threading.Semaphore(0)
    write, slab = gpu_backend._Batch._write, SafetensorsFolder.slab
    first = [True]

    def written_one(batch: Any) -> None:
        write(batch)
        others.release()

    def slow(*arguments: Any) -> torch.Tensor:
        if first and first.pop():
            for _ in range(2):
                assert others.acquire(timeout=20)
        return slab(*arguments)

    monkeypatch.setattr(gpu_backend._Batch, "_write", written_one)
    monkeypatch.setattr(SafetensorsFolder, "slab", slow)
    quantized(written("mixtral")[0], tmp_path / "out", threads=1)


def test_a_fallback_is_told_once(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fallback = Choice(Kernel.NUMBA, "on the CPU, since triton is not installed", is_fallback=True)
    monkeypatch.setattr(dispatch, "choice_for_weights", lambda target: fallback)
    events: list[Event] = []
    result = quantized(
        written("mixtral")[0],
        tmp_path / "out",
        device_memory=1_000_000,
        on_event=events.append,
    )
    heard = [event.text for event in events if isinstance(event, WarningIssued)]
    assert heard == ["numba kernels: on the CPU, since triton is not installed"]
    assert result.warnings == tuple(heard)
    assert result.kernels == result.to_dict()["kernels"] == heard[0]
    (chosen,) = [event for event in events if isinstance(event, BackendChosen)]
    assert chosen == BackendChosen(
        heard[0], "weights are quantized on the CPU, by 2 threads", is_fallback=True
    )


@pytest.mark.usefixtures("on_gpu_path")
def test_kernels_that_cannot_be_compiled_are_a_fallback(
    written: Written, host_made: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def warm_up(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler.\n  Set CC.")

    monkeypatch.setattr("fourfold.run.warm_up.warm_up_device", warm_up)
    result = quantized(written("mixtral")[0], tmp_path / "out")
    assert_same(tmp_path / "out", host_made("mixtral", W4A16))
    (warning,) = result.warnings
    assert warning.startswith("numba kernels: on the CPU, since ")
    assert warning.endswith("kernels cannot run on cpu: Failed to find C compiler. Set CC.")


@pytest.mark.usefixtures("on_gpu_path")
def test_memory_runs_out_while_kernels_are_compiled(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No reason to leave the device: smaller buffers may fit."""
    warm_up = nvfp4.warm_up

    def greedy(*arguments: Any, **options: Any) -> None:
        if isinstance(options["device"], torch.device):  # not the CPU's own, a string
            raise torch.OutOfMemoryError("CUDA out of memory.")
        warm_up(*arguments, **options)

    monkeypatch.setattr(nvfp4, "warm_up", greedy)
    assert quantized(written("mixtral")[0], tmp_path / "out").warnings == ()


@pytest.mark.usefixtures("on_gpu_path")
@pytest.mark.parametrize("memory", [None, 10**6])
@pytest.mark.parametrize("words", ["out of memory", "all CUDA-capable devices are busy"])
def test_a_device_that_cannot_be_used_at_all(
    words: str, memory: int | None, written: Written, host_made: Callable[..., Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Another process has all its memory, or the device for itself."""

    warm_up = nvfp4.warm_up

    def busy(*_: Any) -> int:
        raise torch.AcceleratorError(f"CUDA error: {words}\nCompile with more flags.")

    def warm_up_there(*arguments: Any, **options: Any) -> None:
        if isinstance(options["device"], torch.device):  # not the CPU's own, a string
            busy()
        warm_up(*arguments, **options)

    monkeypatch.setattr("fourfold.execution.streams.free_bytes", busy)
    monkeypatch.setattr(nvfp4, "warm_up", warm_up_there)
    result = quantized(written("mixtral")[0], tmp_path / "out", device_memory=memory)
    assert_same(tmp_path / "out", host_made("mixtral", W4A16))
    (warning,) = result.warnings
    assert f"cannot run on cpu: CUDA error: {words} Compile with more flags." in warning


@pytest.mark.usefixtures("on_gpu_path")
def test_buffers_of_another_size_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the room was halved: nothing of the old size is in the way of the new one."""
    emptied: list[int] = []
    buffers = streams.BufferSet(torch.device("cpu"))
    monkeypatch.setattr(
        streams,
        "empty_caches",
        lambda _: emptied.append(buffers.host.nbytes + buffers.onboard.nbytes),
    )
    for room in (400, 400, 200, 200, 0):
        buffers.begin(room)
        assert (buffers.host.nbytes, buffers.onboard.nbytes) == (room, room)
    assert emptied == [0, 0]


def test_device_memory_that_means_nothing(written: Written, tmp_path: Path) -> None:
    for memory in (0, -5):
        with pytest.raises(fourfold.UsageError, match=r"device_memory=.*at least 1"):
            quantized(written("mixtral")[0], tmp_path / "out", device_memory=memory)
    with pytest.raises(fourfold.UsageError, match=r"no memory of cpu is taken\. Remove it"):
        quantized(written("mixtral")[0], tmp_path / "out", device_memory=10**9)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("on_gpu_path")
def test_pinned_memory_counts(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = written("mixtral")[0]
    chosen = backend.choose_backend("cpu", fourfold.plan(model, W4A16), 2)
    plan = fourfold.plan(model, W4A16)
    assert chosen.pool is not None
    needed = plan.memory(2) + chosen.pool.pinned_bytes
    assert chosen.memory(plan) == needed
    monkeypatch.setattr("fourfold.run.preflight.memory_available", lambda: needed - 1)
    with pytest.raises(fourfold.ResourceError, match="of memory are needed for 2 threads"):
        quantized(model, tmp_path / "out")


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("memory", [None, 200_000, 20_000])
def test_the_bytes_of_the_cpu_on_a_gpu(
    name: str, memory: int | None, written: Written, tmp_path: Path
) -> None:
    """Everything but the figures of the summary, whose last digits are the device's own."""
    model = written(name)[0]
    made = quantized(model, tmp_path / "gpu", DEFAULT, device="cuda", device_memory=memory)
    assert made.warnings == ()
    assert made.kernels.startswith("triton kernels")
    quantized(model, tmp_path / "cpu", DEFAULT)
    assert_same_shards(tmp_path / "gpu", tmp_path / "cpu")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("where", "name"), MOMENTS)
def test_out_of_memory_on_a_gpu(
    where: Any, name: str, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = written("gpt_oss")[0]
    quantized(model, tmp_path / "cpu")
    call = Counted(monkeypatch, where, name)
    call.fails = lambda number, _: out_of_memory(number) if number < 3 else None
    assert quantized(model, tmp_path / "gpu", device="cuda").warnings
    assert_same_shards(tmp_path / "gpu", tmp_path / "cpu")


@pytest.mark.gpu
@gpu
def test_a_device_that_is_full(written: Written, tmp_path: Path) -> None:
    """Memory runs out in earnest: PyTorch may take no more than the process has already."""
    model = written("mixtral")[0]
    quantized(model, tmp_path / "cpu")
    quantized(model, tmp_path / "warm", device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-9)
    try:
        result = quantized(model, tmp_path / "gpu", device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(result.warnings) == 2
    assert_same_shards(tmp_path / "gpu", tmp_path / "cpu")

# SPDX-License-Identifier: Apache-2.0
"""Runs in which a device quantizes scale groups in stacks, by second moments of their inputs: what
they write is what the CPU writes but for codes that rounding decides, whatever goes wrong there.

The device is the CPU: FOURFOLD_KERNELS=triton moves weights to whatever device is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fourfold
from executing import assert_same_shards
from families import FAMILIES, Truth, read_back
from fourfold.algorithms import ALGORITHMS, Weight
from fourfold.algorithms.gptq_joint import GPTQJoint
from fourfold.formats import dispatch
from fourfold.formats.base import WeightFormat
from jobs import flat, ids_file

pytest.importorskip("triton")

Written = Callable[[str], tuple[Path, Truth]]
ROLES = "quantize_if_present: [experts, shared_experts, mlp, attention]"
JOINT = "weights: {scale: gptq_joint, descent: 1}"
MOST_BYTES = 0.01
"""The part of the bytes that may differ. Where rounding decides a code, the rest of its row may
differ, too; of rows as short as these there is hardly one."""


@dataclass(frozen=True)
class Watched(GPTQJoint):
    """Notes the stacks that it is given; those of more than `most` groups have no room."""

    stacks: list[int] = field(default_factory=list, compare=False)
    most: int = 1 << 30

    def quantize_stack(
        self, groups: Sequence[Sequence[Weight]], fmt: WeightFormat, device: torch.device
    ) -> Any:
        if len(groups) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        self.stacks.append(len(groups))
        return super().quantize_stack(groups, fmt, device)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watched]:
    def watch(most: int = 1 << 30) -> Watched:
        algorithm = Watched(most=most)
        monkeypatch.setitem(ALGORITHMS, "gptq_joint", algorithm)
        return algorithm

    return watch


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")


def quantized(
    model: Any, out: Path, recipe: str, *, on_cpu: bool = False, **options: Any
) -> fourfold.Result:
    """A run by a recipe's text; `on_cpu`: as without a device."""
    file = out.with_name(f"{out.name}.yaml")
    file.write_text(f"{recipe}\n{ROLES}\n")
    ids = ids_file(out.parent)
    sizes = {"calib_seq": 24, "calib_size": 3, "batch_size": 3}
    options = {"calib": [ids], **sizes, "threads": 1, "device": "cpu", **options}
    with pytest.MonkeyPatch.context() as patch:
        if on_cpu:
            patch.delenv(dispatch.ENVIRONMENT_VARIABLE)
        result = fourfold.quantize(model, out, file, **flat(**options))
    assert result.clean, str(result.report)
    return result


def assert_nearly_same(one: fourfold.Result, other: fourfold.Result) -> None:
    """The same tensors, and but for `MOST_BYTES` the same values; errors within 1 %."""
    tensors = [
        {name: x for file in out.glob("*.safetensors") for name, x in load_file(file).items()}
        for out in (one.out, other.out)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    different = total = 0
    for name in tensors[0]:
        mine, theirs = (x[name].contiguous().reshape(-1).view(torch.uint8) for x in tensors)
        different, total = different + int((mine != theirs).sum()), total + len(mine)
    assert different <= MOST_BYTES * total
    for mine, theirs in zip(one.linears, other.linears, strict=True):
        assert mine.relative_error == pytest.approx(theirs.relative_error, rel=0.01)
        assert (mine.name, mine.amax, mine.tokens) == (theirs.name, theirs.amax, theirs.tokens)


RUNS = [
    ("qwen3_moe", JOINT),
    pytest.param(
        "deepseek_v3",
        "weights: {scale: gptq, pooled: true}\nactivations: {format: nvfp4}",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(("name", "recipe"), RUNS)
def test_nearly_the_bytes_of_the_cpu(
    name: str, recipe: str, written: Written, tmp_path: Path
) -> None:
    """And the same ones for any threads."""
    model = written(name)[0]
    runs = [
        quantized(model, tmp_path / f"{threads}", recipe, threads=threads, verify=True)
        for threads in (1, 2)
    ]
    assert_same_shards(runs[0].out, runs[1].out)
    on_cpu = quantized(model, tmp_path / "cpu", recipe, on_cpu=True)
    assert_nearly_same(runs[0], on_cpu)
    assert runs[0].warnings == on_cpu.warnings


@pytest.mark.usefixtures("on_device")
def test_experts_of_a_layer_are_one_stack(
    written: Written, watched: Callable[..., Watched], tmp_path: Path
) -> None:
    """Their gates and ups, and their downs."""
    algorithm = watched()
    result = quantized(written("qwen3_moe")[0], tmp_path / "out", JOINT)
    assert sum(algorithm.stacks) == len(result.plan.groups)
    assert result.plan.expert_count == 8  # in two layers
    assert algorithm.stacks.count(4) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("on_device")
def test_a_model_in_memory(written: Written, tmp_path: Path) -> None:
    folder = written("qwen3_moe")[0]
    model, _ = read_back(FAMILIES["qwen3_moe"], folder)
    quantized(folder, tmp_path / "streamed", JOINT)
    quantized(model, tmp_path / "live", JOINT)
    assert_same_shards(tmp_path / "streamed", tmp_path / "live")


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("threads", [(2,), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_layers_that_are_quantized_sequentially(
    threads: tuple[int, ...], written: Written, watched: Callable[..., Watched], tmp_path: Path
) -> None:
    """Their stages go to the device as well, with targets that make up for moved inputs.

    The inputs of later layers depend on earlier codes, so the bytes are compared over threads only.
    """
    recipe = f"{JOINT}\ncalibration: {{propagate: quantized, asymmetric: 0.5}}"
    algorithm = watched()
    model = written("qwen3_moe")[0]
    one = quantized(model, tmp_path / "one", recipe, threads=threads[0])
    assert sum(algorithm.stacks) == len(one.plan.groups)
    assert max(algorithm.stacks) > 1
    assert all(linear.asymmetric == 0.5 for linear in one.linears)
    for count in threads[1:]:
        quantized(model, tmp_path / "two", recipe, threads=count)
        assert_same_shards(tmp_path / "one", tmp_path / "two")


@pytest.mark.usefixtures("on_device")
def test_too_little_memory_for_a_group(
    written: Written, watched: Callable[..., Watched], tmp_path: Path
) -> None:
    """The CPU quantizes it, to the CPU's bytes, and a warning says so."""
    algorithm = watched()
    model = written("qwen3_moe")[0]
    result = quantized(model, tmp_path / "out", JOINT, device_memory=100_000)
    quantized(model, tmp_path / "cpu", JOINT, on_cpu=True)
    assert_same_shards(tmp_path / "out", tmp_path / "cpu")
    assert algorithm.stacks == []
    (warning,) = result.warnings
    assert "are quantized on the CPU. Codes that rounding decides may differ" in warning


@pytest.mark.slow
@pytest.mark.usefixtures("on_device")
def test_weights_that_share_a_scale_but_no_inputs(
    written: Written, watched: Callable[..., Watched], tmp_path: Path
) -> None:
    """All experts of a layer in one scale group are left to the CPU."""
    algorithm = watched()
    recipe = "weights: {scale: gptq_joint, scale_group: layer}"
    model = written("qwen3_moe")[0]
    result = quantized(model, tmp_path / "out", recipe)
    on_cpu = quantized(model, tmp_path / "cpu", recipe, on_cpu=True)
    assert_nearly_same(result, on_cpu)
    assert sum(algorithm.stacks) == 8  # of attention and an MLP


@pytest.mark.usefixtures("on_device")
def test_memory_that_runs_out(
    written: Written, watched: Callable[..., Watched], tmp_path: Path
) -> None:
    """The stack is done again in smaller ones, and so is all that follows."""
    algorithm = watched(most=2)
    model = written("qwen3_moe")[0]
    result = quantized(model, tmp_path / "out", JOINT)
    assert sum(algorithm.stacks) == len(result.plan.groups)
    assert max(algorithm.stacks) == 2
    (warning,) = result.warnings
    assert warning.startswith("cpu: out of memory: scale groups are quantized there in stacks of ")


@pytest.mark.slow
@pytest.mark.usefixtures("on_device")
def test_memory_that_is_never_enough(
    written: Written, watched: Callable[..., Watched], tmp_path: Path
) -> None:
    watched(most=0)
    model = written("qwen3_moe")[0]
    result = quantized(model, tmp_path / "out", JOINT)
    quantized(model, tmp_path / "cpu", JOINT, on_cpu=True)
    assert_same_shards(tmp_path / "out", tmp_path / "cpu")
    assert len(result.warnings) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "recipe"), RUNS)
def test_nearly_the_bytes_of_the_cpu_on_a_gpu(
    name: str, recipe: str, written: Written, tmp_path: Path
) -> None:
    """The model runs there as well, so the inputs differ by rounding, too: only errors compare."""
    model = written(name)[0]
    on_gpu = [
        quantized(model, tmp_path / f"{threads}", recipe, device="cuda", threads=threads)
        for threads in (1, 2)
    ]
    assert_same_shards(on_gpu[0].out, on_gpu[1].out)
    on_cpu = quantized(model, tmp_path / "cpu", recipe)
    for mine, theirs in zip(on_gpu[0].linears, on_cpu.linears, strict=True):
        assert mine.relative_error == pytest.approx(theirs.relative_error, rel=0.05)

# SPDX-License-Identifier: Apache-2.0
"""The FP8 formats through whole runs, in a layout of this folder: planned, quantized whole and in
pieces, resumed, on ranks, and loaded again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import fourfold
from executing import assert_same_shards, execute
from fourfold.config import OutputConfig, Runtime
from fourfold.embedded import model_dir
from fourfold.events import BackendChosen, Event, Resumed, ShardWritten
from fourfold.formats.base import FORMATS as KNOWN
from fourfold.formats.fp8 import reference
from fourfold.layouts.base import LAYOUTS
from fourfold.planning import Limits
from jobs import assert_same, flat, ids_file
from nvfp4_folders import tensors_of
from test_ranks import on_ranks

from . import plain

FORMATS = ("fp8", "fp8_channel", "fp8_block", "mxfp8")
BLOCKS = {"fp8_channel": (1, 1 << 9), "fp8_block": (128, 128), "mxfp8": (1, 32)}
SCALES = {"fp8_block": "weight_scale_inv"}
DEFAULT = OutputConfig(verify=False)


@pytest.fixture(autouse=True)
def layout() -> Iterator[None]:
    """The layout of this folder is known in each test, and in no other."""
    plain.register()
    yield
    del LAYOUTS["plain"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose inputs are multiples of 128, with 384 rows in q and 200 in lm_head."""
    config = Qwen3MoeConfig(
        vocab_size=200, hidden_size=128, num_hidden_layers=2, num_attention_heads=12,
        num_key_value_heads=4, head_dim=32, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=128, max_position_embeddings=64, intermediate_size=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Qwen3MoeForCausalLM(config).bfloat16()
        for parameter in made.parameters():
            parameter.data.add_(torch.randn_like(parameter) / 20)
    folder = tmp_path_factory.mktemp("model")
    made.save_pretrained(folder)
    return folder


def recipe(folder: Path, name: str, more: str = "") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(
        f"weights: {{format: {name}, scale: max}}\nquantize: [experts, attention, lm_head]\n"
        f"layout: plain\n{more}"
    )
    return file


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_the_definition(name: str, model: Path, tmp_path: Path) -> None:
    result = fourfold.quantize(
        model, tmp_path / "out", recipe(tmp_path, name), output=DEFAULT, runtime=Runtime(threads=2)
    )
    source, tensors = load_file(model / "model.safetensors"), tensors_of(tmp_path / "out")
    assert len(result.linears) == 2 * (4 + 2 * 3) + 1
    amax = {
        group.name: max(float(source[f"{x.name}.weight"].abs().max()) for x in group.linears)
        for group in result.plan.groups
    }
    group_of = {x.name: group.name for group in result.plan.groups for x in group.linears}
    for linear in result.linears:
        w_OI, codes = source[f"{linear.name}.weight"], tensors[f"{linear.name}.weight"]
        stored = tensors[f"{linear.name}.{SCALES.get(name, 'weight_scale')}"]
        assert codes.dtype == torch.float8_e4m3fn
        block = BLOCKS.get(name, tuple(w_OI.shape))
        amaxes = reference.block_amaxes(w_OI, (block[0], block[1]))
        scales = reference.scales_of(amaxes)
        if name == "fp8":
            scales = reference.scales_of(torch.tensor([[amax[group_of[linear.name]]]]))
            assert linear.global_scale == float(scales)
        elif name == "mxfp8":
            scales = reference.powers(reference.exponents_of(amaxes))
            stored = reference.powers(stored)
        assert torch.equal(stored.reshape(scales.shape), scales)
        expected = reference.quantize(w_OI, scales, (block[0], block[1]))
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
        assert 0.01 < linear.relative_error < 0.04
    shapes = {f"{linear.name}.weight": linear.shape for linear in result.linears}
    expected_shape = {"fp8": 1, "fp8_channel": 200, "fp8_block": 2, "mxfp8": 200 * 4}[name]
    assert tensors[f"lm_head.{SCALES.get(name, 'weight_scale')}"].numel() == expected_shape
    assert shapes["lm_head.weight"] == (200, 128)


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_give_the_same_bytes(name: str, model: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, name)
    execute(model, tmp_path / "whole", file, Limits())
    execute(model, tmp_path / "pieces", file, Limits(group_bytes=4096))
    assert_same_shards(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.parametrize("name", FORMATS)
def test_a_stopped_run_goes_on(name: str, model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"output": DEFAULT, "runtime": Runtime(threads=1)}
    file = recipe(tmp_path, name)
    fourfold.quantize(model, tmp_path / "unbroken", file, **options)

    class StoppedError(Exception):
        """What a test stops a run with."""

    def stop(event: Event) -> None:
        if isinstance(event, ShardWritten):
            raise StoppedError

    with pytest.raises(StoppedError):
        fourfold.quantize(model, tmp_path / "out", file, on_event=stop, **options)
    events: list[Event] = []
    fourfold.quantize(model, tmp_path / "out", file, on_event=events.append, **options)
    assert any(isinstance(event, Resumed) and event.finished for event in events)
    assert_same(tmp_path / "unbroken", tmp_path / "out")


def test_ranks_write_what_one_writes(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "mixed.yaml"
    file.write_text(
        "rules:\n"
        "- {roles: [experts], weights: {format: nvfp4, scale: max}}\n"
        "- {roles: [attention], weights: {format: fp8_block, scale: max}}\n"
        "layout: plain\n"
    )
    before = "from extending import plain\nplain.register()\n"
    for ranks, out in ((1, "one"), (2, "two")):
        arguments = ["quantize", model, tmp_path / out, "--recipe", file, "--no-verify"]
        for code, _, stderr in on_ranks(arguments, ranks=ranks, before=before):
            assert code == 0, stderr
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    assert one.keys() == two.keys()
    assert {tensor.dtype for tensor in one.values()} >= {torch.uint8, torch.float8_e4m3fn}
    for key, tensor in one.items():
        assert torch.equal(*(x.flatten().view(torch.uint8) for x in (tensor, two[key]))), key


def test_static_input_scales_are_calibrated(model: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, "fp8", "activations: {format: fp8}\n")
    data = flat(calib=[ids_file(tmp_path)], calib_seq=24, calib_size=8, verify=False)
    result = fourfold.quantize(model, tmp_path / "out", file, **data)
    tensors = tensors_of(tmp_path / "out")
    for linear in result.linears:
        scale = float(tensors[f"{linear.name}.input_scale"])
        assert scale == linear.input_scale > 0
        assert linear.input_amax is None or linear.input_amax <= scale * 448 * (1 + 2**-23)


@pytest.mark.parametrize("name", FORMATS[1:])
def test_dynamic_inputs_need_no_calibration(name: str, model: Path, tmp_path: Path) -> None:
    plan = fourfold.plan(model, recipe(tmp_path, name, f"activations: {{format: {name}}}\n"))
    assert not plan.needs_calibration
    tensors = {tensor for shard in plan.shards for tensor in shard.tensors}
    assert not any(tensor.endswith("input_scale") for tensor in tensors)


def test_inputs_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(fourfold.PlanError, match="64 is not a multiple of 128"):
        fourfold.plan(model_dir(), recipe(tmp_path, "fp8_block"))


@pytest.mark.parametrize("name", FORMATS)
def test_batches_on_a_device_give_the_bytes_of_the_cpu(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's interpreter stands for the device; formats without batches stay on the CPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    file, runtime = recipe(tmp_path, name), Runtime(threads=1)
    fourfold.quantize(model, tmp_path / "cpu", file, output=DEFAULT, runtime=runtime)
    monkeypatch.setenv("FOURFOLD_KERNELS", "triton")
    events: list[Event] = []
    fourfold.quantize(
        model, tmp_path / "device", file, output=DEFAULT, runtime=runtime, on_event=events.append
    )
    assert any("triton" in event.backend for event in events if isinstance(event, BackendChosen))
    assert_same_shards(tmp_path / "cpu", tmp_path / "device")


@pytest.mark.parametrize("name", FORMATS)
def test_load_rounds_inputs_as_engines_do(name: str, model: Path, tmp_path: Path) -> None:
    more = "activations: {format: fp8}\n" if name == "fp8" else ""
    data = {"calib": [ids_file(tmp_path)], "calib_seq": 24, "calib_size": 8} if more else {}
    file = recipe(tmp_path, name, more)
    fourfold.quantize(model, tmp_path / "out", file, **flat(verify=False, **data))
    exact: Any = fourfold.load(tmp_path / "out", dtype=torch.float32)
    rounded: Any = fourfold.load(tmp_path / "out", dtype=torch.float32, simulate_activations=True)
    path, inputs = "model.layers.0.self_attn.k_proj", []
    for loaded in (exact, rounded):  # the second hook runs after that of the simulation
        loaded.get_submodule(path).register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0])
        )
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        logits = [loaded(ids).logits for loaded in (exact, rounded)]
    rounding = rounded.fourfold_simulation.sites.linears[path]
    assert (rounding.format, rounding.scale is None) == (name, name != "fp8")
    expected = KNOWN[name].round_activations(inputs[0], rounding.scale)
    assert torch.equal(inputs[1], expected)
    assert not torch.equal(inputs[0], expected)
    assert 0 < float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.2
    assert set(rounded.fourfold_simulation.calls) >= {
        f"model.layers.1.mlp.experts.{product}" for product in ("gate_up", "down")
    }


def test_nvfp4_experts_and_fp8_attention_are_rounded_each_in_its_way(
    model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mixed.yaml"
    file.write_text(
        "rules:\n"
        "- {roles: [experts], weights: {format: nvfp4, scale: max}, "
        "activations: {format: nvfp4, amax: constant}}\n"
        "- {roles: [attention], weights: {format: mxfp8, scale: max}, "
        "activations: {format: mxfp8}}\n"
        "layout: plain\n"
    )
    fourfold.quantize(model, tmp_path / "out", file, output=DEFAULT)
    loaded: Any = fourfold.load(tmp_path / "out", simulate_activations=True)
    sites = loaded.fourfold_simulation.sites
    assert set(sites.linears.values()) == {("mxfp8", None)}
    assert sites.experts["model.layers.0.mlp.experts"]["down"] == ("nvfp4", 1.0)


def test_blocks_do_not_reach_over_weights_that_engines_fuse(tmp_path: Path) -> None:
    file = tmp_path / "blocks.yaml"
    weights = "weights: {format: fp8_block, scale: max}"
    names = '["*.q_proj", "*.k_proj", "*.v_proj"]'
    file.write_text(f"rules:\n  - {{names: {names}, {weights}}}\nlayout: plain\n")
    with pytest.raises(fourfold.PlanError, match=r"k_proj and .*v_proj: engines fuse .* 64 "):
        fourfold.plan(model_dir(), file)
    file.write_text(f"{weights}\nquantize: [attention]\nlayout: plain\n")  # no rule names them
    names = {linear.name for linear in fourfold.plan(model_dir(), file).linears}
    assert names == {f"model.layers.{layer}.self_attn.o_proj" for layer in range(4)}


def test_tensor_parallel_ranks_hold_whole_blocks(model: Path, tmp_path: Path) -> None:
    plan = fourfold.plan(model, recipe(tmp_path, "fp8_block"))
    assert plan.tensor_parallel[1] == ""
    assert plan.tensor_parallel[2] == (
        "experts' intermediate size 128 leaves a rank no multiple of 128"
    )
    file = tmp_path / "attention.yaml"
    file.write_text(recipe(tmp_path, "fp8_block").read_text().replace("experts, ", ""))
    assert fourfold.plan(model, file).tensor_parallel[2] == (
        "k_proj's output 128 leaves a rank no multiple of 128"
    )


@pytest.mark.parametrize(("factor", "is_lost"), [(2.0**-26, True), (2.0**-8, False)])
def test_a_weight_lost_beside_its_group_is_repaired(
    factor: float, is_lost: bool, model: Path, tmp_path: Path
) -> None:
    """In FP8 per tensor; in the other formats a weight has its own scales."""
    shutil.copytree(model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    key = "model.layers.1.self_attn.k_proj"
    tensors[f"{key}.weight"] = tensors[f"{key}.weight"] * factor
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    for name in ("fp8", "fp8_channel"):
        result = fourfold.quantize(
            tmp_path / "model", tmp_path / name, recipe(tmp_path, name), output=DEFAULT
        )
        assert list(result.repairs) == ([key] if is_lost and name == "fp8" else [])

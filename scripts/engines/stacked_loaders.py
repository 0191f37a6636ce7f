# SPDX-License-Identifier: Apache-2.0
"""Stacked experts through the engines' own loading functions, on a CPU, without the engines.

    python -m pip download --no-deps vllm==0.33.0 sglang==0.5.23    # unpack the wheels
    PYTHONPATH=tests python scripts/engines/stacked_loaders.py VLLM SGLANG

VLLM and SGLANG are the folders that hold the packages `vllm` and `sglang`. The functions are cut
out of their files, since importing the packages would need a GPU, and are given parameters that
keep what is loaded into them. Every expert's codes and scales must then be those of the checkpoint
that has its experts one by one. The exit code is 1 if they are not.
"""

from __future__ import annotations

import argparse
import ast
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import fourfold
from families import FAMILIES, write_checkpoint
from nvfp4_folders import Tensors, tensors_of

RECIPE = "nvfp4_experts_only_mse-constant_inputs"
SHARDS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
LEAVES = ("weight", "weight_scale", "weight_scale_2", "input_scale")

Loaded = dict[tuple[int, str, str], Tensor]
"""By expert, projection and the part's name."""


def cut_out(file: Path, name: str, **globals_: Any) -> Any:
    """Return a function of a file, or of a class in it, defined among these globals."""
    tree = ast.parse(file.read_text())
    node = next(x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name == name)
    node.decorator_list = []
    module = ast.parse("from __future__ import annotations")
    module.body.append(node)
    namespace: dict[str, Any] = {"torch": torch, "math": math, **globals_}
    exec(compile(module, str(file), "exec"), namespace)
    return namespace[name]


def value_of(file: Path, name: str) -> Any:
    """Return the value of a keyword argument or a constant of a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        is_keyword = isinstance(node, ast.keyword) and node.arg == name
        is_constant = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
        if is_keyword or is_constant:
            expression = compile(ast.Expression(node.value), str(file), "eval")
            return eval(expression, {"re": re, "torch": torch})
    raise LookupError(f"{file}: no {name}")


class Recorder:
    """A parameter of all experts: its `weight_loader` keeps what it is given."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded

    def weight_loader(
        self, param: Any, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int
    ) -> None:
        leaf = next(x for x in sorted(LEAVES, key=len, reverse=True) if weight_name.endswith(x))
        self.loaded[expert_id, SHARDS[shard_id], leaf] = loaded_weight


def from_stacks(params: Mapping[str, Tensor]) -> Loaded:
    """Take vLLM's and SGLang's parameters apart: w13 has the gate's rows first, then up's."""
    loaded: Loaded = {}
    for name, value in params.items():
        stack, leaf = name.split("_", 1)
        for expert, own in enumerate(value):
            if stack == "w2":
                loaded[expert, "down_proj", leaf] = own
            else:
                halves = own.chunk(2) if own.ndim else (own, own)
                loaded[expert, "gate_proj", leaf], loaded[expert, "up_proj", leaf] = halves
    return loaded


def shapes(experts: int, width: int, outputs: int) -> dict[str, Tensor]:
    """The parameters that ModelOpt's method of both engines makes for a layer."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    fp8, f32 = torch.float8_e4m3fn, torch.float32
    return {
        "w13_weight": empty(experts, 2 * outputs, width // 2, dtype=torch.uint8),
        "w13_weight_scale": empty(experts, 2 * outputs, width // 16, dtype=fp8),
        "w13_weight_scale_2": empty(experts, 2, dtype=f32),
        "w13_input_scale": empty(experts, 2, dtype=f32),
        "w2_weight": empty(experts, width, outputs // 2, dtype=torch.uint8),
        "w2_weight_scale": empty(experts, width, outputs // 16, dtype=fp8),
        "w2_weight_scale_2": empty(experts, dtype=f32),
        "w2_input_scale": empty(experts, dtype=f32),
    }


def params_for(tensors: Tensors, codes: str) -> dict[str, Tensor]:
    experts, rows, half = tensors[codes].shape
    return shapes(experts, 2 * half, rows // 2)


def vllm_muse_spark(vllm: Path, tensors: Tensors, at: str) -> Loaded:
    folder = vllm / "vllm/models/muse_spark/common"
    renames = value_of(folder / "omni.py", "orig_to_new_regex")
    load = cut_out(folder / "moe.py", "load_weights")
    loaded: Loaded = {}
    weights = {}
    for key in inside(tensors, at):
        name = key
        for pattern, new in renames.items():
            name = pattern.sub(new, name)
        if ".experts." in name:
            weights[name.rpartition(".experts.")[2]] = tensors[key]
    layer = SimpleNamespace(layer_name=at, **{name: Recorder(loaded) for name in weights})
    list(load(layer, weights.items()))
    return loaded


def vllm_inkling(vllm: Path, tensors: Tensors, at: str) -> Loaded:
    folder = vllm / "vllm/models/inkling/nvidia"
    renames = value_of(folder / "model.py", "orig_to_new_suffix")
    constant = "_NVFP4_INPUT_SCALE_DENOMINATOR"
    load = cut_out(
        folder / "moe.py",
        "load_expert_weight",
        **{constant: value_of(folder / "moe.py", constant)},
    )
    params = params_for(tensors, f"{at}.w13_weight")
    parallel = SimpleNamespace(tp_rank=0)
    routed = SimpleNamespace(
        moe_config=SimpleNamespace(moe_parallel_config=parallel),
        **{name: nn.Parameter(value, requires_grad=False) for name, value in params.items()},
    )
    experts = range(len(params["w2_weight"]))
    layer = SimpleNamespace(
        experts=SimpleNamespace(routed_experts=routed),
        _local_expert_slots=lambda: {number: number for number in experts},
    )
    for key in inside(tensors, at):
        name = next((key.removesuffix(a) + b for a, b in renames.items() if key.endswith(a)), key)
        load(layer, f"experts.{name.rpartition('.experts.')[2]}", tensors[key])
    return from_stacks({name: getattr(routed, name).data for name in params})


def sglang_muse_spark(sglang: Path, tensors: Tensors, at: str) -> Loaded:
    folder = sglang / "sglang/srt"
    create = cut_out(folder / "layers/muse_spark/muse_spark_nvfp4_moe.py", "create_weights")
    copy = cut_out(
        folder / "models/muse_spark.py",
        "_copy_expert_stack",
        get_parallel=lambda: SimpleNamespace(moe_ep_size=1, moe_ep_rank=0),
    )
    experts, rows, half = tensors[f"{at}.gate_up_proj"].shape
    layer = nn.Module()
    method = SimpleNamespace(quant_config=SimpleNamespace(group_size=16))
    create(method, layer, experts, 2 * half, rows // 2, torch.bfloat16)
    model = SimpleNamespace(config=SimpleNamespace(num_local_experts=experts))
    params = dict(layer.named_parameters())
    for name, param in params.items():
        copy(model, param, tensors[f"{at}.{name}"], name)
    codes = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}
    renamed = {}
    for name, param in params.items():
        other = re.sub("^gate_up_proj_", "w13_", re.sub("^down_proj_", "w2_", name))
        renamed[codes.get(name, other)] = param.data
    return from_stacks(renamed)


def sglang_step3p7(sglang: Path, tensors: Tensors, at: str) -> Loaded:
    folder = sglang / "sglang/srt"
    mapping = cut_out(folder / "layers/moe/fused_moe_triton/layer.py", "make_expert_params_mapping")
    load = cut_out(
        folder / "models/step3p5.py",
        "load_weights",
        FusedMoE=SimpleNamespace(
            make_expert_params_mapping=lambda **kwargs: mapping(None, **kwargs)
        ),
        default_weight_loader=None,
    )
    around = at.removesuffix(".experts")
    names = [key for key in inside(tensors, around) if "_proj." in key]
    loaded: Loaded = {}
    params = [f"{at}.{stack}_{leaf}" for stack in ("w13", "w2") for leaf in LEAVES]
    model = SimpleNamespace(
        config=SimpleNamespace(
            num_hidden_layers=3, moe_num_experts=len(tensors[f"{around}.down_proj.weight"])
        ),
        num_fused_shared_experts=0,
        named_parameters=lambda: [(name, Recorder(loaded)) for name in params],
    )
    load(model, [(name, tensors[name]) for name in names])
    return loaded


def inside(tensors: Tensors, module: str) -> Iterator[str]:
    for key in tensors:
        rest = key.removeprefix(f"{module}.")
        if rest != key and "norm" not in rest and not rest.startswith("gate."):
            yield key


LOADERS: Mapping[tuple[str, str], Callable[[Path, Tensors, str], Loaded]] = {
    ("vLLM", "inkling"): vllm_inkling,
    ("vLLM", "muse_spark"): vllm_muse_spark,
    ("SGLang", "muse_spark"): sglang_muse_spark,
    ("SGLang", "step3p7"): sglang_step3p7,
}


def differences(loaded: Loaded, apart: Tensors, at: str) -> tuple[int, list[str]]:
    """Return how many tensors the experts have, and which were loaded with other bytes."""
    own = [key for key in apart if re.fullmatch(rf"{re.escape(at)}\.\d+\.\w+\.\w+", key)]
    wrong = []
    for key in own:
        expert, projection, leaf = key.removeprefix(f"{at}.").split(".")
        found = loaded.get((int(expert), projection, leaf))
        if (
            found is None
            or found.dtype != apart[key].dtype
            or not torch.equal(bits(found), bits(apart[key]))
        ):
            wrong.append(key)
    return len(own), wrong


def bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("vllm", type=Path)
    parser.add_argument("sglang", type=Path)
    options = parser.parse_args()
    failed = False
    for (engine, family), load in LOADERS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_checkpoint(FAMILIES[family], folder / "source")
            fourfold.quantize(folder / "source", folder / "out", RECIPE)
            fourfold.convert(folder / "out", folder / "stacked", layout="modelopt-stacked")
            apart, stacked = tensors_of(folder / "out"), tensors_of(folder / "stacked")
        modules = {m[1] for key in apart if (m := re.match(r"(.*\.experts)\.\d+\.", key))}
        root = options.vllm if engine == "vLLM" else options.sglang
        results = [differences(load(root, stacked, at), apart, at) for at in sorted(modules)]
        wrong = [key for _, keys in results for key in keys]
        count = sum(number for number, _ in results)
        print(f"{engine} {family}: {count - len(wrong)} of {count} tensors exact", *wrong[:3])
        failed |= bool(wrong) or not count
    raise SystemExit(failed)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Proves that a codec is one class and one line in the registry: a checkpoint in a form that only
the test knows is quantized through it, and gives the bytes of the same values in BF16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourfold
from conftest import Written
from fourfold.errors import SourceError
from fourfold.sources.codecs import CODECS
from fourfold.sources.codecs.base import EncodedWeight, ReadRows, TensorCodec, presented
from fourfold.sources.decoded import open_decoded
from fourfold.storage.safetensors_header import TensorInfo
from nvfp4_folders import tensors_of

RECIPE = "w4a16_nvfp4_experts_only_mse"
GROUP = 4


class GroupedInt8(TensorCodec):
    """`<key>_q` I8 and `<key>_s` F32, a scale for four rows: of matrices and of fused experts."""

    name = "grouped_int8"
    title = "grouped INT8"

    def __init__(self) -> None:
        self.most_rows = 0

    def claim(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> Mapping[str, EncodedWeight]:
        if config.get("quantization_config", {}).get("quant_method") != "grouped-int8":
            return {}
        return {
            key: EncodedWeight(
                presented(info, key, info.shape, config), {"q": info.key, "s": f"{key}_s"}
            )
            for info in tensors.values()
            if (key := info.key.removesuffix("_q")) != info.key
        }

    def decode(
        self, weight: EncodedWeight, start: int, stop: int, read: ReadRows, out: torch.Tensor
    ) -> None:
        self.most_rows = max(self.most_rows, stop - start)
        first, last = start // GROUP, -(-stop // GROUP)
        scales = read(weight.parts["s"], first, last).repeat_interleave(GROUP)
        scales = scales[start - first * GROUP :][: stop - start]
        codes = read(weight.parts["q"], start, stop).float()
        out.copy_(codes * scales.view(-1, *(1,) * (codes.ndim - 1)))


def encode(folder: Path, out: Path) -> None:
    """Write `folder` as grouped INT8 into `out`, and replace its own values by the decoded ones."""
    shutil.copytree(folder, out)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "grouped-int8"}
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    encoded: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        if value.ndim < 2 or value.dtype != torch.bfloat16:
            encoded[key] = value
            continue
        groups = value.float().abs().flatten(1).amax(1).split(GROUP)
        scales = torch.stack([group.amax() for group in groups]) / 127
        rows = scales.repeat_interleave(GROUP)[: len(value)].view(-1, *(1,) * (value.ndim - 1))
        codes = (value.float() / rows).round().to(torch.int8)
        encoded |= {f"{key}_q": codes, f"{key}_s": scales}
        tensors[key] = (codes * rows).bfloat16()
    save_file(encoded, out / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.fixture
def codec(monkeypatch: pytest.MonkeyPatch) -> GroupedInt8:
    codec = GroupedInt8()
    monkeypatch.setitem(CODECS, codec.name, codec)
    return codec


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_quantized_source_is_quantized_through_its_codec(
    family: str, codec: GroupedInt8, written: Written, tmp_path: Path
) -> None:
    folder = shutil.copytree(written(family)[0], tmp_path / "source")
    encode(folder, tmp_path / "encoded")
    wanted = fourfold.quantize(folder, tmp_path / "wanted", RECIPE)
    result = fourfold.quantize(tmp_path / "encoded", tmp_path / "out", RECIPE)
    assert result.clean, str(result.report)
    assert f"weights from {codec.title}" in result.plan.notes[0]
    assert len(result.linears) == len(wanted.linears) > 0
    tensors, wanted_tensors = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "wanted")
    assert tensors.keys() == wanted_tensors.keys()
    for key, tensor in wanted_tensors.items():
        assert torch.equal(bits(tensors[key]), bits(tensor)), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((tmp_path / "wanted" / "config.json").read_text())
    again = fourfold.verify(tmp_path / "out", source=tmp_path / "encoded")
    assert again.clean, str(again)


def test_only_the_rows_that_are_read_are_decoded(
    codec: GroupedInt8, written: Written, tmp_path: Path
) -> None:
    folder = shutil.copytree(written("gpt_oss")[0], tmp_path / "source")
    encode(folder, tmp_path / "encoded")
    source = open_decoded(tmp_path / "encoded")
    key = "model.layers.0.mlp.experts.gate_up_proj"
    wanted = load_file(folder / "model.safetensors")[key]
    for expert in range(len(wanted)):
        assert torch.equal(source.slab(key, expert, expert + 1), wanted[expert : expert + 1])
    assert codec.most_rows == 1
    source.close()


def test_without_a_codec_a_quantized_source_is_refused(written: Written, tmp_path: Path) -> None:
    folder = shutil.copytree(written("qwen3_moe")[0], tmp_path / "source")
    encode(folder, tmp_path / "encoded")
    with pytest.raises(SourceError, match=r"_q in .*: I8, quantized already \(grouped-int8\)"):
        fourfold.plan(tmp_path / "encoded")


def test_a_model_is_loaded_through_its_codec(
    codec: GroupedInt8, written: Written, tmp_path: Path
) -> None:
    folder = shutil.copytree(written("qwen3_moe")[0], tmp_path / "source")
    encode(folder, tmp_path / "encoded")
    model = fourfold.load(tmp_path / "encoded")
    wanted = load_file(folder / "model.safetensors")
    assert torch.equal(model.model.embed_tokens.weight, wanted["model.embed_tokens.weight"])


def test_a_folder_that_is_converted_in_part(
    codec: GroupedInt8, written: Written, tmp_path: Path
) -> None:
    """One expert of layer 1 is as it was. A list that names it says that this is meant."""
    folder = shutil.copytree(written("qwen3_moe")[0], tmp_path / "source")
    key = "model.layers.1.mlp.experts.3.down_proj.weight"
    value = load_file(folder / "model.safetensors")[key]
    encode(folder, tmp_path / "encoded")
    file = tmp_path / "encoded" / "model.safetensors"
    tensors = {
        name: x for name, x in load_file(file).items() if name not in (f"{key}_q", f"{key}_s")
    }
    save_file({**tensors, key: value}, file, metadata={"format": "pt"})
    config_file = tmp_path / "encoded" / "config.json"
    config = json.loads(config_file.read_text())

    def plan(**stated: object) -> fourfold.Plan:
        quantization = config["quantization_config"] | stated
        config_file.write_text(json.dumps(config | {"quantization_config": quantization}))
        return fourfold.plan(tmp_path / "encoded", RECIPE)

    for stated in (
        {},
        {"ignore": [""]},
        {"quantized_layers": None},
        {"config_groups": {"group_0": {"targets": ["Linear"]}}},
        {"config_groups": {"group_0": {"targets": [r"re:.*\.experts\..*"]}}},
    ):
        with pytest.raises(SourceError, match=rf"{key} in .*: BF16, while other weights of its"):
            plan(**stated)
    for entry in ("layers.1.mlp.experts.3.down_proj", r"re:.*\.experts\.3\.down_proj$", "*.3.*"):
        assert plan(ignore=[entry]).linears
    assert plan(config_groups={"group_0": {"targets": [r"re:.*\.experts\.[0-2]\..*"]}}).linears
    with pytest.raises(SourceError, match=r"^config\.json: re:\( in quantization_config is no reg"):
        plan(ignore=["re:("])


def test_a_part_that_is_left_over(codec: GroupedInt8, written: Written, tmp_path: Path) -> None:
    folder = shutil.copytree(written("qwen3_moe")[0], tmp_path / "source")
    encode(folder, tmp_path / "encoded")
    file, key = (
        tmp_path / "encoded" / "model.safetensors",
        "model.layers.1.mlp.gate.weight_scale_inv",
    )
    save_file({**load_file(file), key: torch.ones(1, 1)}, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=rf"{key} in .*: F32, of a weight that is not grouped"):
        fourfold.plan(tmp_path / "encoded", RECIPE)

# SPDX-License-Identifier: Apache-2.0
"""The state of ModelOpt's quantizers: named as such, and never taken for weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fourfold

from .test_source import W4A16, digests, refused

AMAXES = {
    "decoder.layers.mlp.experts.experts.linear_fc1.weight_quantizer._amax": (3, 4, 1),
    "decoder.layers.mlp.experts.experts.linear_fc1.input_quantizer._amax": (3, 4),
    "decoder.layers.self_attention.core_attention.k_bmm_quantizer._amax": (3,),
    "decoder.layers.self_attention.linear_qkv.weight_quantizer.0._global_amax": (3,),
}


def adding(shapes: dict[str, tuple[int, ...]]) -> Callable[[dict[str, torch.Tensor]], None]:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: torch.ones(shape) for key, shape in shapes.items()})

    return add


def test_amaxes_are_left_out_with_a_note(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    plain, hf = made()
    fourfold.quantize(plain, tmp_path / "plain", W4A16, hf_config=hf)
    state = ("modelopt_state/shard_0_1", "decoder.layers.0.mlp.input_quantizer._extra_state")
    made(change=adding(AMAXES), objects=state)  # over it
    result = fourfold.quantize(plain, tmp_path / "out", W4A16, hf_config=hf)
    assert result.clean
    (note,) = [note for note in result.plan.notes if "quantizers" in note]
    assert note.startswith("6 keys are the state of ModelOpt's quantizers (modelopt_state")
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("_pre_quant_scale", "smoothed"),
        ("_scale", "stored quantized"),
        ("_double_scale", "stored quantized"),
    ],
)
def test_what_the_weights_depend_on_is_refused(
    state: str, words: str, made: Callable[..., tuple[Path, Path]]
) -> None:
    key = f"decoder.layers.0.self_attention.linear_qkv.weight_quantizer.{state}"
    checkpoint, hf = made(change=adding({key: (64,)}))
    refused(checkpoint, hf, key, "ModelOpt", words)

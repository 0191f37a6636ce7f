# SPDX-License-Identifier: Apache-2.0
"""A reference that cannot be what a quantized source was made from is named: before the run, if its
names and shapes show it, and otherwise as an error of the report."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fourfold
from conftest import Written
from encoding import W4A16, Tensors, change_config, change_tensors
from fourfold.config import OutputConfig
from fourfold.errors import SourceError


@pytest.fixture(scope="module")
def quantized(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    fourfold.quantize(written("qwen3_moe")[0], out, W4A16)
    return out


EXPERT = "model.layers.1.mlp.experts.1.down_proj.weight"


def of_other_width(tensors: Tensors) -> None:
    for key in tensors:
        if ".experts." in key:
            value = tensors[key]
            tensors[key] = value[:, :16].contiguous() if "down" in key else value[:16].contiguous()


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            of_other_width,
            {"moe_intermediate_size": 16},
            r"down_proj: BF16 \[64, 16\], where the output has a weight \[64, ",
        ),
        (
            lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(torch.int16)}),
            {},
            r"experts\.1\.down_proj: I16 .*, where the output has a weight .* \(1 such",
        ),
    ],
)
def test_a_reference_that_cannot_fit(
    change: Callable[[Tensors], object],
    config: dict[str, int],
    message: str,
    quantized: Path,
    written: Written,
    tmp_path: Path,
) -> None:
    """It is named before a weight is quantized."""
    reference = shutil.copytree(written("qwen3_moe")[0], tmp_path / "reference")
    change_tensors(reference, change)
    change_config(reference, **config)
    output = OutputConfig(reference=reference)
    with pytest.raises(SourceError, match=rf"^{re.escape(str(reference))}: .*{message}"):
        fourfold.quantize(quantized, tmp_path / "out", W4A16, output=output)
    assert not (tmp_path / "out").exists()


def unlike(tensors: Tensors) -> None:
    """Values that have nothing in common with the source's, and are larger."""
    generator = torch.Generator().manual_seed(0)
    for key, value in tensors.items():
        if ".experts." in key:
            noise = torch.randn(value.shape, generator=generator) * 20 * value.float().std()
            tensors[key] = noise.bfloat16()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda tensors: tensors[EXPERT][3, 4:5].fill_(torch.nan), "NaN or Inf in"),
        (lambda tensors: tensors[EXPERT].zero_(), "nothing but zeros in"),
        (lambda tensors: tensors[EXPERT].neg_(), "relative error 1.9"),
        (unlike, "relative error 1.0"),
    ],
)
def test_a_reference_that_is_not_the_original(
    change: Callable[[Tensors], object],
    found: str,
    quantized: Path,
    written: Written,
    tmp_path: Path,
) -> None:
    reference = shutil.copytree(written("qwen3_moe")[0], tmp_path / "reference")
    change_tensors(reference, change)
    report = fourfold.verify(quantized, reference=reference)
    assert {error.id for error in report.errors} == {"reference-differs"}
    by_name = {error.tensor: error.found for error in report.errors}
    assert by_name[EXPERT.removesuffix(".weight")].startswith(found)
    assert str(reference) in by_name[EXPERT.removesuffix(".weight")]
    assert len(by_name) == (1 if change is not unlike else sum(".experts." in x for x in by_name))

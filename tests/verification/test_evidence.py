# SPDX-License-Identifier: Apache-2.0
"""Evidence from the time of writing: it saves reading the source again, and excuses nothing."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fourfold
from families import Truth
from fourfold.planning import make_plan
from fourfold.recipes import Recipe
from fourfold.sources.safetensors import open_source
from fourfold.storage.safetensors_header import read_header
from fourfold.storage.source import Bytes, Source, SourceView
from fourfold.verification import Report, verify
from fourfold.verification.evidence import Evidence, Prover
from jobs import W4A16

RULES = """
rules:
  - {roles: [experts]}
  - {roles: [attention], weights: {format: fp8, scale: max},
     activations: {format: fp8, amax: constant}}
"""

Written = Callable[[str], tuple[Path, Truth]]


class Watched(SourceView):
    """A source that notes which tensors are read, and may refuse."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.keys: set[str] = set()

    def slab(self, key: str, start: int, stop: int, out: Bytes | None = None) -> torch.Tensor:
        self.keys.add(key)
        return super().slab(key, start, stop, out)

    def read_bytes(self, key: str, start: int, out: Bytes) -> None:
        self.keys.add(key)
        super().read_bytes(key, start, out)


@pytest.fixture(scope="module")
def proven(
    written: Written, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, Evidence]]:
    """A source, its output, and the evidence for every tensor of it."""
    model = written("qwen3_vl_moe")[0]
    out = tmp_path_factory.mktemp("proven") / "out"
    fourfold.quantize(model, out, W4A16)
    evidence: dict[str, Evidence] = {}
    with closing(open_source(model)) as source:
        plan = make_plan(source, Recipe.load(W4A16))
        config = json.loads((out / "config.json").read_text())
        for name in plan.shard_names:
            file = out / name
            prover = Prover(file, config, source, plan.inventory, source.tensors)
            names = [x.name for x in plan.linears]
            evidence |= prover.prove(names, [*read_header(file)])
            prover.close()
    return model, out, evidence


def verified(model: Path, out: Path, evidence: Mapping[str, Evidence]) -> tuple[Report, set[str]]:
    """The report by evidence, and the source's tensors that were read for it."""
    with closing(open_source(model)) as source:
        watched = Watched(source)
        return verify(out, source=watched, evidence=evidence), watched.keys


def without_reading(report: Report) -> Any:
    return replace(report, counts=replace(report.counts, bytes_read=0))


def test_the_report_is_the_same_and_nothing_is_read(proven: Any) -> None:
    model, out, evidence = proven
    report, keys = verified(model, out, evidence)
    expected, all_keys = verified(model, out, {})
    assert not keys
    assert all_keys
    assert without_reading(report) == without_reading(expected)
    assert report.counts.bytes_read < expected.counts.bytes_read


def test_what_has_no_evidence_is_read(proven: Any) -> None:
    model, out, evidence = proven
    linear = next(name for name in evidence if f"{name}.weight" not in evidence and "." in name)
    copied = "model.language_model.norm.weight"
    assert copied in evidence
    some = {name: x for name, x in evidence.items() if name not in (linear, copied)}
    report, keys = verified(model, out, some)
    assert report.clean
    assert copied in keys
    assert 1 <= len(keys) <= 2


@pytest.mark.parametrize("part", ["weight", "weight_scale", "weight_scale_2", "copied"])
def test_bytes_that_changed_since_are_compared_with_the_source(
    part: str, proven: Any, tmp_path: Path
) -> None:
    """A report by evidence finds of a damaged checkpoint what a report without it finds."""
    model, out, evidence = proven
    damaged = tmp_path / "out"
    shutil.copytree(out, damaged)
    infos = {k: v for x in damaged.glob("model-*") for k, v in read_header(x).items()}
    linear = next(name for name in sorted(evidence) if f"{name}.weight_scale" in infos)
    key = "model.language_model.norm.weight" if part == "copied" else f"{linear}.{part}"
    info = infos[key]
    with info.file.open("r+b") as file:
        file.seek(info.start)
        data = file.read(info.nbytes)
        file.seek(info.start)
        file.write(bytes(x ^ 0x11 for x in data))
    report, keys = verified(model, damaged, evidence)
    expected, _ = verified(model, damaged, {})
    assert keys
    assert without_reading(report) == without_reading(expected)
    assert report.findings != verified(model, out, {})[0].findings


def test_a_tensor_in_the_wrong_place_gets_no_evidence(proven: Any, tmp_path: Path) -> None:
    model, out, _ = proven
    damaged = tmp_path / "out"
    shutil.copytree(out, damaged)
    file = next(
        x for x in damaged.glob("model-*") if "model.language_model.norm.weight" in read_header(x)
    )
    info = read_header(file)["model.language_model.norm.weight"]
    with file.open("r+b") as handle:
        handle.seek(info.start)
        handle.write(b"\1" * info.nbytes)
    config = json.loads((out / "config.json").read_text())
    with closing(open_source(model)) as source:
        plan = make_plan(source, Recipe.load(W4A16))
        prover = Prover(file, config, source, plan.inventory, source.tensors)
        evidence = prover.prove([], [*read_header(file)])
        prover.close()
    assert info.key not in evidence
    assert evidence


@pytest.mark.parametrize(
    ("scale", "factor"),
    [
        (".weight_scale_2", 1.4),
        ("_proj.weight_scale", 1.12),  # an error that is large for FP8 alone
    ],
)
def test_large_errors_come_with_their_reference(
    scale: str, factor: float, written: Written, tmp_path: Path
) -> None:
    """The error that decides on a suspect is taken while the source is at hand, too."""
    model, out = written("qwen3_vl_moe")[0], tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RULES)
    fourfold.quantize(model, out, recipe)
    scaled = set()
    for file in out.glob("model-*"):
        for key, info in read_header(file).items():
            if key.endswith(scale) and info.dtype == "F32":
                with file.open("r+b") as handle:
                    handle.seek(info.start)
                    value = torch.frombuffer(
                        bytearray(handle.read(info.nbytes)), dtype=torch.float32
                    )
                    handle.seek(info.start)
                    handle.write((value * factor).numpy().tobytes())
                scaled.add(key.rpartition(".")[0])
    config = json.loads((out / "config.json").read_text())
    evidence: dict[str, Evidence] = {}
    with closing(open_source(model)) as source:
        plan = make_plan(source, Recipe.load(recipe))
        for name in plan.shard_names:
            prover = Prover(out / name, config, source, plan.inventory, source.tensors)
            for group in plan.groups:
                evidence |= prover.prove([x.name for x in group.linears], [])
            prover.close()
    references = {name: x.reference for name, x in evidence.items() if x.reference is not None}
    assert references.keys() == scaled
    assert all(map(math.isfinite, references.values()))
    report, keys = verified(model, out, evidence)
    expected, _ = verified(model, out, {})
    assert not report.clean
    assert {x.tensor for x in report.errors} == {x.tensor for x in expected.errors}
    assert not keys & {linear.region.key for linear in plan.linears}

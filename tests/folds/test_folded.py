# SPDX-License-Identifier: Apache-2.0
"""A folded source reads every slab as a plain multiplication of whole tensors gives it, and the
file of factors comes back as it was written, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from families import LAYOUTS, Truth
from fourfold.errors import SourceError
from fourfold.models.folds import Fold, find_folds
from fourfold.models.inventory_builder import take_inventory
from fourfold.sources.folded import Factors, FoldedSource, read_factors
from fourfold.sources.safetensors import open_source
from fourfold.storage.names import FOLDS
from fourfold.storage.source import Source

Written = Callable[[str], tuple[Path, Truth]]


def folded(folder: Path) -> tuple[Source, FoldedSource, dict[str, Fold]]:
    source, random = open_source(folder), torch.Generator().manual_seed(1)
    folds = dict(find_folds(take_inventory(source), source.config).folds)
    exponents = {
        name: torch.randint(-3, 4, (fold.channels,), generator=random).to(torch.int8)
        for name, fold in folds.items()
    }
    return source, FoldedSource(source, folds, Factors(exponents)), folds


def multiplied(source: Source, view: FoldedSource, folds: dict[str, Fold]) -> dict[str, Tensor]:
    """The reference: whole tensors, region by region."""
    tensors = {key: source.read(key).clone() for key in source.tensors}
    for name, exponents in view.factors.exponents.items():
        factors = 2.0 ** exponents.double()
        for region in folds[name].writers:
            part = region.view(tensors[region.key][slice(*region.slab)])
            part.copy_(part.double() / (factors if part.ndim == 1 else factors[:, None]))
        for region in folds[name].readers:
            part = region.view(tensors[region.key][slice(*region.slab)])
            part.copy_(part.double() * factors)
    return tensors


@pytest.mark.parametrize("name", sorted({*LAYOUTS, "dbrx", "llama4", "phimoe"}))
def test_every_slab(name: str, written: Written) -> None:
    source, view, folds = folded(written(name)[0])
    expected = multiplied(source, view, folds)
    changed = 0
    for key, tensor in expected.items():
        rows = source.tensors[key].rows
        changed += not torch.equal(tensor, source.read(key))
        assert torch.equal(view.read(key), tensor)
        for start, stop in ((0, 1), (rows // 3, rows), (rows // 2, rows // 2 + 1)):
            if start < stop and tensor.ndim:
                assert torch.equal(view.slab(key, start, stop), tensor[start:stop]), (key, start)
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        out = np.empty(max(1, len(data) // 2), dtype=np.uint8)
        view.read_bytes(key, len(data) // 3, out)
        assert np.array_equal(out, data[len(data) // 3 :][: len(out)])
    assert changed > len(folds) / 2


def test_file_of_factors(tmp_path: Path) -> None:
    exponents = {"b": torch.tensor([1, -2, 0], dtype=torch.int8), "a": torch.ones(2).to(torch.int8)}
    factors = Factors(exponents, "origin", {"tokens": 5}, [{"name": "b", "kept": True}])
    again = replace(factors, exponents=dict(reversed(exponents.items())))
    assert factors.to_bytes() == again.to_bytes()
    assert read_factors(tmp_path) is None
    (tmp_path / FOLDS).write_bytes(factors.to_bytes())
    read = read_factors(tmp_path)
    assert read is not None
    numbers = {name: tensor.tolist() for name, tensor in read.exponents.items()}
    assert numbers == {"a": [1, 1], "b": [1, -2, 0]}
    assert (read.origin, read.texts, read.choices) == ("origin", {"tokens": 5}, factors.choices)
    assert read.digest == factors.digest


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 20,
        save({"a": torch.ones(2).to(torch.int8)}),
        save({"a": torch.ones(2)}, metadata={"fourfold folds 1": "{}"}),
        save({"a": torch.ones(2).to(torch.int8)}, metadata={"fourfold folds 1": '{"x": 1}'}),
        save({"a": torch.full((2,), 99, dtype=torch.int8)}, metadata={"fourfold folds 1": "{}"}),
    ],
    ids=["empty", "zeros", "no metadata", "floats", "unknown key", "too large"],
)
def test_damaged_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / FOLDS).write_bytes(data)
    with pytest.raises(SourceError, match=f"{FOLDS}: not the factors"):
        read_factors(tmp_path)


def test_factors_of_another_model_are_refused(written: Written) -> None:
    source, _, folds = folded(written("qwen3_moe")[0])
    for name, size in (("model.layers.9.norm", 64), (next(iter(folds)), 32)):
        with pytest.raises(SourceError, match=f"{name}: {FOLDS} has"):
            FoldedSource(source, folds, Factors({name: torch.zeros(size, dtype=torch.int8)}))

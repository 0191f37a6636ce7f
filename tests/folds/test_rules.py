# SPDX-License-Identifier: Apache-2.0
"""Every family's folds leave what the model computes as it is; the rules of each are pinned.

Every fold of a tiny model gets random powers of two, so that a reader that the rules miss, or one
that they take for a reader, changes the logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from families import FAMILIES, Truth, mostly_slow, write_checkpoint
from fourfold.calibration.streaming import StreamedModel
from fourfold.models.folds import Fold, Folds, Kind, find_folds
from fourfold.models.internals import runnable
from fourfold.models.inventory_builder import take_inventory
from fourfold.sources.folded import Factors, FoldedSource
from fourfold.sources.safetensors import open_source
from fourfold.storage.source import Source

Written = Callable[[str], tuple[Path, Truth]]

RULES = Path(__file__).with_name("rules.json")
"""By family: how many folds of each kind it has, and what is left alone, with the reason."""

UNREADABLE = {"longcat_flash_zero"}
"""Families that do not run."""


def folds_of(source: Source) -> Folds:
    return find_folds(take_inventory(source), source.config)


def described(folds: Folds) -> dict[str, object]:
    kinds = [fold.kind for fold in folds.folds.values()]
    counts = {kind.value: kinds.count(kind) for kind in Kind if kind in kinds}
    return counts | {"left alone": dict(folds.left_alone)}


def random_factors(folds: Mapping[str, Fold]) -> Factors:
    random = torch.Generator().manual_seed(0)
    return Factors(
        {
            name: torch.randint(-3, 4, (fold.channels,), generator=random).to(torch.int8)
            for name, fold in sorted(folds.items())
        }
    )


def logits_of(source: Source, dtype: torch.dtype = torch.float32) -> Tensor:
    model = runnable(StreamedModel(source, dtype=dtype, towers=True).load_all())
    ids = torch.arange(48).reshape(2, 24) * 7 % 90 + 5
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if model.config.is_encoder_decoder or "decoder_input_ids" in model.forward.__code__.co_varnames:
        inputs["decoder_input_ids"] = ids[:, : getattr(model.config, "canvas_length", None)]
    with torch.no_grad():
        output = model(**inputs)
    return (output.logits if hasattr(output, "logits") else output[0]).double()


def kl(one: Tensor, other: Tensor) -> float:
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).max())


@pytest.mark.parametrize("name", mostly_slow(FAMILIES))
def test_rules_of_every_family_are_pinned(name: str, written: Written) -> None:
    source = open_source(written(name)[0])
    assert described(folds_of(source)) == json.loads(RULES.read_text())[name]


@pytest.mark.parametrize("name", mostly_slow(x for x in FAMILIES if x not in UNREADABLE))
def test_folded_model_computes_the_same(name: str, written: Written) -> None:
    source = open_source(written(name)[0])
    folds = folds_of(source).folds
    if folds:
        expected = logits_of(source)
        folded = FoldedSource(source, folds, random_factors(folds))
        assert kl(expected, logits_of(folded)) < 1e-9
        assert float(expected.std()) > 1e-3  # the model says something


def test_reader_that_is_missed_shows(written: Written) -> None:
    """What the test above would say if the rules missed the router, or a norm's bias."""
    source = open_source(written("phimoe")[0])
    folds = folds_of(source).folds
    expected = logits_of(source)
    for part in ("readers", "writers"):
        broken = {
            name: replace(fold, **{part: getattr(fold, part)[1:]})
            for name, fold in folds.items()
            if fold.kind is Kind.NORM
        }
        folded = FoldedSource(source, broken, random_factors(broken))
        assert kl(expected, logits_of(folded)) > 1e-4


def test_bf16_model_computes_the_same_bits(written: Written) -> None:
    """Powers of two are exact in BF16, too: norms, routers and every product."""
    source = open_source(written("qwen3_moe")[0])
    folds = folds_of(source).folds
    folded = FoldedSource(source, folds, random_factors(folds))
    assert torch.equal(logits_of(source, torch.bfloat16), logits_of(folded, torch.bfloat16))


if __name__ == "__main__":
    import tempfile

    rules = {}
    for name, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(family, Path(folder))
            rules[name] = described(folds_of(open_source(Path(folder))))
    RULES.write_text(json.dumps(rules, indent=1) + "\n")

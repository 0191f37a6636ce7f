# SPDX-License-Identifier: Apache-2.0
"""What is broken by the fuzz: small checkpoints of four layouts, and what runs made of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from transformers import PreTrainedConfig

import fourfold
from families import FAMILIES, Family, write_checkpoint
from fourfold.embedded import model_dir
from jobs import flat

W4A16 = "w4a16_nvfp4_experts_only_mse"
W4A4 = "nvfp4_default_mse-fp8_kv"
FAMILY_SHARDS = {"qwen3_moe": 1, "mixtral": 3, "gpt_oss": 1, "qwen3_vl_moe": 2}
"""One tensor per expert, in one file and in several; fused; fused in a multimodal model."""

CALIB_OPTIONS = {"calib_size": 2, "calib_seq": 16, "batch_size": 2}


@dataclass(frozen=True)
class Bases:
    """Folders and files that cases copy. Nothing may be written into them."""

    root: Path

    def source(self, family: str) -> Path:
        return self.root / family

    def out(self, family: str, recipe: str) -> Path:
        """What quantizing the family's checkpoint with the recipe made."""
        return self.root / f"{family}-{recipe}"

    @property
    def calib(self) -> tuple[Path, ...]:
        """Data in each form that the tokenizer of `source` reads."""
        return tuple(self.root / name for name in ("ids.jsonl", "text.jsonl", "plain.txt"))


def make_bases(root: Path) -> Bases:
    """Write everything into the folder `root`."""
    bases = Bases(root)
    rows = [Random(seed).choices(range(3, 300), k=24) for seed in range(6)]
    text = [f"Line {n}: the quick brown fox jumps over the lazy dog.\n\n" for n in range(20)]
    ids, records, plain = bases.calib
    ids.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    records.write_text(
        "".join(json.dumps(_record(n, words)) + "\n" for n, words in enumerate(text))
    )
    plain.write_text("".join(text))
    for name, shards in FAMILY_SHARDS.items():
        write_checkpoint(_known_to_tokenizer(FAMILIES[name]), bases.source(name), shards=shards)
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(model_dir() / file, bases.source(name))
        for recipe in (W4A16, W4A4):
            options = {"calib": [ids], **CALIB_OPTIONS} if recipe == W4A4 else {}
            out = bases.out(name, recipe)
            assert fourfold.quantize(
                bases.source(name), out, recipe, **flat(threads=1, **options)
            ).clean
    return bases


def _record(number: int, words: str) -> dict[str, str]:
    return {"text": words} if number % 2 else {"prompt": words[:12], "completion": words[12:]}


def _known_to_tokenizer(family: Family) -> Family:
    """The family with as many embeddings as the embedded tokenizer has tokens, and more."""

    def build_config() -> PreTrainedConfig:
        config = family.build_config()
        config.get_text_config().vocab_size = 320
        return config

    return replace(family, build_config=build_config)

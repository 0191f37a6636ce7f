# SPDX-License-Identifier: Apache-2.0
"""Whatever stands in the JSON files: a report, or a refusal; never a traceback or no end."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fourfold.verification import UnreadableError, verify

from .build import draft

FILES = ("config.json", "hf_quant_config.json", "model.safetensors.index.json")
VALUES = (None, 1, -3, 2.5, 10**30, True, "", "x", "NVFP4", "FP8", [], [1], [["a"]], {}, {"a": {}})


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict | list):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in inside:
            found += places(item, (*path, key))
    return found


def damaged(document: Any, chance: random.Random) -> Any:
    document = copy.deepcopy(document)
    *parents, last = chance.choice(places(document))
    holder = document
    for key in parents:
        holder = holder[key]
    if chance.random() < 0.2:
        del holder[last]
    else:
        holder[last] = copy.deepcopy(chance.choice(VALUES))
    return document


@pytest.mark.parametrize("algo", ["NVFP4", "MIXED_PRECISION"])
def test_a_damaged_json_file_is_judged_or_refused(algo: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    draft(algo, kv=True).write(out)
    documents = {name: json.loads((out / name).read_text()) for name in FILES}
    chance = random.Random(0)
    for _ in range(120):
        name = chance.choice(FILES)
        (out / name).write_text(json.dumps(damaged(documents[name], chance)))
        with suppress(UnreadableError):
            report = verify(out)
            assert json.loads(report.to_json())["clean"] == report.clean
        (out / name).write_text(json.dumps(documents[name]))


@pytest.mark.parametrize("field", ["num_experts", "num_hidden_layers"])
def test_an_absurd_count_is_listed_up_to_a_limit(field: str, tmp_path: Path) -> None:
    d = draft()
    d.config[field] = 10**30
    d.write(tmp_path / "out")
    report = verify(tmp_path / "out")
    assert {finding.id for finding in report.findings} <= {"expert-missing", "layer-missing"}
    assert 1000 <= len(report.findings) <= 2000


def test_the_name_verify_is_the_function_however_it_was_imported() -> None:
    code = (
        "import fourfold, fourfold.api, fourfold.verification.rules\n"
        "for _ in range(2):\n"
        "    try: fourfold.verify('nowhere')\n"
        "    except fourfold.SourceError as error: assert error.exit_code == 2\n"
        "    else: raise SystemExit(1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

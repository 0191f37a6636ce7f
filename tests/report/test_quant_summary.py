# SPDX-License-Identifier: Apache-2.0
"""`quant_summary.json`: it survives being read and written, and what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourfold.errors import SourceError
from fourfold.storage.quant_summary import find_summary, read_summary

from .documents import document


def write(folder: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "quant_summary.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    return folder


def test_reading_and_writing_keeps_every_key_and_value(tmp_path: Path) -> None:
    later = document(2, 3) | {"a_later_key": {"x": 1}}
    later["linears"][0] |= {"a_later_figure": 0.5, "tokens": None}
    assert json.loads(read_summary(write(tmp_path, later)).to_json()) == later


def test_the_same_summary_gives_the_same_bytes(tmp_path: Path) -> None:
    text = read_summary(write(tmp_path, document(2, 3))).to_json()
    assert read_summary(write(tmp_path, text)).to_json() == text
    assert text.count("\n") > 2 * (2 * 13)  # a line for each linear weight


def test_keys_that_earlier_versions_did_not_write_have_defaults(tmp_path: Path) -> None:
    earlier = document(2, 3)
    first = {"producer", "model_type", "architecture", "recipe", "ledger", "files", "linears"}
    for key in earlier.keys() - first:
        del earlier[key]
    for entry in earlier["linears"]:
        for key in ("format", "layer", "expert", "input_amax", "input_scale", "tokens"):
            del entry[key]
    summary = read_summary(write(tmp_path, earlier))
    assert summary.calibration is None
    assert summary.linears[0].input_amax is None
    assert summary.title == "Qwen3MoeForCausalLM"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda s: s.pop("linears"), "linears: Field required"),
        (lambda s: s.update(linears=3), "linears: "),
        (lambda s: s.update(schema_version=2), "schema_version: "),
        (lambda s: s["linears"][1].pop("name"), "linears.1.name: Field required"),
        (lambda s: s["linears"][1].update(layer="1"), "linears.1.layer: "),
        (lambda s: s["linears"][1].update(tokens=-1), "linears.1.tokens: "),
        (lambda s: s["linears"][1].update(dtype="I8"), "linears.1.dtype: "),
        (lambda s: s["linears"][1].update(raw={"key": "x"}), "linears.1.raw.expert: "),
        (lambda s: s["linears"][1].update(raw=RAW | {"rows": [4, 4, 1]}), "linears.1.raw.rows: "),
        (lambda s: s["linears"][1].update(raw=RAW | {"cols": [0, 4, 0]}), "linears.1.raw.cols: "),
        (lambda s: s["ledger"].update(bytes_after=1.5), "ledger.bytes_after: "),
        (lambda s: s["calibration"].update(tokens=True), "calibration.tokens: "),
    ],
)
def test_a_field_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], field: str
) -> None:
    summary = document(1, 2)
    change(summary)
    with pytest.raises(SourceError) as caught:
        read_summary(write(tmp_path, summary))
    assert f"quant_summary.json: {field}" in str(caught.value)
    assert "\n" not in str(caught.value)


RAW = {"key": "x", "expert": None, "rows": [0, 4, 1], "cols": [0, 4, 1], "transposed": False}


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000, "\udcff", ""])
def test_a_file_that_is_something_else(tmp_path: Path, content: str) -> None:
    with pytest.raises(SourceError, match=r"quant_summary.json: .* Quantize the model again\."):
        read_summary(write(tmp_path, content))


def test_a_folder_without_a_summary(tmp_path: Path) -> None:
    assert find_summary(tmp_path) is None
    with pytest.raises(SourceError, match=r"no quant_summary.json, which `fourfold quantize`"):
        read_summary(tmp_path)
    with pytest.raises(SourceError, match="nothing: no such folder"):
        read_summary(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="file: is a file"):
        read_summary(tmp_path / "file")

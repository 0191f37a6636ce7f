# SPDX-License-Identifier: Apache-2.0
"""Proves that what the source predicts is kept, and used again only where it is the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

import fourfold
from fourfold.embedded import model_dir
from fourfold.errors import OutputError, SourceError
from fourfold.evaluation.evaluated import Evaluation
from fourfold.evaluation.reference import default_folder

from .checkpoints import LENGTH, WINDOWS, Ran, options_for, write_outputs

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_outputs(tmp_path_factory.mktemp("outputs"))


def figures_of(evaluation: Evaluation) -> list[object]:
    return [replace(model, ratio=None, ratio_interval=None) for model in evaluation.models]


def test_the_source_runs_once_for_a_text(outputs: Pair, tmp_path: Path) -> None:
    ran, options = Ran(), options_for(tmp_path / "cache")
    first = fourfold.evaluate(model_dir(), outputs, options, on_event=ran)
    assert ran.taken() == ["source", "w4a16", "w4a4"]
    again = fourfold.evaluate(model_dir(), outputs[1], options, on_event=ran)
    assert ran.taken() == ["w4a4"]
    assert (first.from_cache, again.from_cache) == (False, True)
    assert figures_of(again) == figures_of(first)[1:]
    assert again.perplexity == first.perplexity
    assert again.cache == first.cache is not None
    file = Path(first.cache)
    assert file.parent == tmp_path / "cache"
    assert file.stat().st_size == first.cache_bytes
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(file).items()}
    assert shapes == {
        "ids": (WINDOWS, LENGTH, 320),
        "log_probs": (WINDOWS, LENGTH, 320),
        "rest": (WINDOWS, LENGTH),
        "nll": (WINDOWS, LENGTH),
    }
    assert f"kept in {file}" in str(first)
    assert f"read from {file}" in str(again)


def touch(source: Path) -> None:
    os.utime(source / "model.safetensors", ns=(1, 1))


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"windows": WINDOWS - 1}, None),
        ({"length": LENGTH - 1}, None),
        ({"top": 64}, None),
        ({"text": __file__}, None),
        ({}, touch),
    ],
    ids=["windows", "length", "top", "text", "source"],
)
def test_something_else_is_not_taken_for_it(
    options: dict[str, object],
    change: Callable[[Path], None] | None,
    outputs: Pair,
    tmp_path: Path,
) -> None:
    source = shutil.copytree(model_dir(), tmp_path / "source")
    ran, usual = Ran(), options_for(tmp_path / "cache")
    fourfold.evaluate(source, outputs[0], usual)
    if change is not None:
        change(source)
    found = fourfold.evaluate(source, outputs[0], replace(usual, **options), on_event=ran)
    assert ran.models == ["source", "w4a16"]
    assert not found.from_cache


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_damaged_file_is_written_again(keep: int, outputs: Pair, tmp_path: Path) -> None:
    options = options_for(tmp_path / "cache")
    first = fourfold.evaluate(model_dir(), outputs[0], options)
    assert first.cache is not None
    file = Path(first.cache)
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    again = fourfold.evaluate(model_dir(), outputs[0], options)
    assert not again.from_cache
    assert figures_of(again) == figures_of(first)
    assert file.read_bytes() == whole


def test_nothing_is_kept_without_a_cache(
    outputs: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "temporary").mkdir()
    found = fourfold.evaluate(model_dir(), outputs[0], options_for(cache=False))
    assert (found.cache, found.cache_bytes, found.from_cache) == (None, 0, False)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not (tmp_path / "home").exists()
    kept = fourfold.evaluate(model_dir(), outputs[0], options_for(cache=True))
    assert kept.cache is not None
    assert Path(kept.cache).parent == default_folder() == tmp_path / "home/fourfold/evaluation"
    assert figures_of(kept) == figures_of(found)


def test_a_run_that_fails_leaves_no_file(outputs: Pair, tmp_path: Path) -> None:
    source = shutil.copytree(model_dir(), tmp_path / "source")
    options = options_for(tmp_path / "cache")

    def stop(event: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fourfold.evaluate(source, outputs[0], options, on_event=stop)
    assert list((tmp_path / "cache").iterdir()) == []


def test_predictions_of_a_source_that_changes_are_not_kept(outputs: Pair, tmp_path: Path) -> None:
    source = shutil.copytree(model_dir(), tmp_path / "source")
    options = options_for(tmp_path / "cache")
    with pytest.raises(SourceError, match="changed while it was read"):
        fourfold.evaluate(source, outputs[0], options, on_event=lambda _: touch(source))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_cannot_be_written(outputs: Pair, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file"):
        fourfold.evaluate(model_dir(), outputs[0], options_for(tmp_path / "file"))

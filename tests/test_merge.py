# SPDX-License-Identifier: Apache-2.0
"""Shards of a checkpoint, joined or cut anew, byte for byte; parts that do not fit together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fourfold
from families import Truth
from fourfold.config import OutputConfig
from fourfold.distributed.ranks import Ranks
from fourfold.planning import cut
from fourfold.storage.run_state import RunState
from jobs import W4A16, assert_same, files_of

Written = Callable[[str], tuple[Path, Truth]]
FAMILIES = [
    "qwen3_moe",
    "gpt_oss",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_5_moe_vl", "mixtral")),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name: str, written: Written, tmp_path: Path) -> None:
    """Any layout gives any other, as if it had been written so."""
    made = {}
    for shards in (1, 2, 5):
        made[shards] = tmp_path / f"made{shards}"
        fourfold.quantize(written(name)[0], made[shards], W4A16, output=OutputConfig(shards=shards))
    for before in made:
        for after in made:
            out = tmp_path / f"{before}-{after}"
            merged = fourfold.merge([made[before]], out, shards=after)
            assert merged.report is not None
            assert merged.report.clean
            assert_same(out, made[after])
    assert len(files_of(made[5])) > len(files_of(made[1]))


@pytest.fixture
def parts(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[Path]]:
    """What two nodes write that share no folder; each rank is played in its turn."""

    def make(recipe: str = W4A16, folder: str = "parts") -> list[Path]:
        out = tmp_path / folder
        fourfold.quantize(
            written("qwen3_moe")[0], out / "whole", recipe, output=OutputConfig(shards=2)
        )
        names = sorted((out / "whole").glob("*.safetensors"))
        with monkeypatch.context() as patch:  # stop before OUT becomes a checkpoint
            patch.setattr("fourfold.run.job.Job._finish", stop)
            with pytest.raises(KeyboardInterrupt):
                fourfold.quantize(
                    written("qwen3_moe")[0], out / "0", recipe, output=OutputConfig(shards=2)
                )
        shutil.copytree(out / "0", out / "1")
        for number, name in enumerate(names):
            forget(out / str(number % 2), name.name)
        rest = out / "0" / ".fourfold" / "rest"
        shutil.copytree(out / "whole", rest, ignore=shutil.ignore_patterns("*.safetensors"))
        return [out / "0", out / "1"]

    return make


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


def forget(part: Path, shard: str) -> None:
    """A part as if another node had written this shard."""
    (part / shard).unlink()
    (part / ".fourfold" / "shards" / f"{shard}.json").unlink()


def test_parts(parts, written: Written, tmp_path: Path) -> None:
    fourfold.quantize(written("qwen3_moe")[0], tmp_path / "one", W4A16)
    before = files_of(tmp_path / "parts") if (tmp_path / "parts").exists() else {}
    folders = parts()
    before = files_of(tmp_path / "parts")
    fourfold.merge(reversed(folders), tmp_path / "out")
    assert_same(tmp_path / "out", tmp_path / "one")
    assert files_of(tmp_path / "parts") == before
    fourfold.merge(folders, tmp_path / "out2", shards=2)
    assert_same(tmp_path / "out2", tmp_path / "parts" / "whole")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def edit_run(part: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = part / ".fourfold" / "run.json"
    run = json.loads(file.read_text())
    change(run["identity"])
    file.write_text(json.dumps(run))


SPOILT: dict[str, tuple[Callable[[list[Path]], Any], str]] = {
    "twice": (lambda each: each.append(each[1]), "lies both in .*/1 and in .*/1"),
    "missing": (lambda each: each.pop(), r"lies in none of these folders \(\d of \d+ shards\)"),
    "no first": (lambda each: each.pop(0), "the folder of its first rank is not among these 1"),
    "nothing": (lambda each: each.clear(), "no folder to merge"),
    "damaged": (
        lambda each: flip(next(iter(sorted(each[1].glob("*.safetensors"))))),
        "damaged since it was written",
    ),
    "gone": (
        lambda each: next(iter(sorted(each[1].glob("*.safetensors")))).unlink(),
        "shard is missing",
    ),
    "another recipe": (
        lambda each: edit_run(each[1], lambda run: run["recipe"].update(name="other")),
        "a part of another run than .*: recipe.name: ",
    ),
    "another source": (
        lambda each: edit_run(
            each[1], lambda run: run["source"]["files"]["model.safetensors"].__setitem__(2, "x")
        ),
        r"a part of another run than .*: source\.files",
    ),
    "no such folder": (lambda each: each.append(each[0].parent / "2"), "no such folder"),
    "a whole one": (
        lambda each: each.insert(0, each[0].parent / "whole"), "a whole checkpoint, not a part"
    ),
    "a whole one behind": (
        lambda each: each.append(each[0].parent / "whole"), "is not a part of a run"
    ),
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT)
def test_parts_that_do_not_fit(spoil: str, parts, tmp_path: Path) -> None:
    folders = parts()
    change, words = SPOILT[spoil]
    change(folders)
    with pytest.raises(fourfold.FourfoldError, match=words) as caught:
        fourfold.merge(folders, tmp_path / "out")
    assert len(str(caught.value).splitlines()) <= 2
    assert not (tmp_path / "out").exists()


def test_times_of_copies_of_the_source_do_not_count(parts, tmp_path: Path) -> None:
    folders = parts()
    edit_run(folders[1], lambda run: run["source"]["files"]["model.safetensors"].__setitem__(1, 7))
    assert fourfold.merge(folders, tmp_path / "out").report is not None


def test_a_part_that_is_still_written(parts, tmp_path: Path) -> None:
    folders = parts()
    state = RunState(folders[1])
    state.lock("token")
    with pytest.raises(fourfold.OutputError, match=f"process {os.getpid()} on .* is writing it"):
        fourfold.merge(folders, tmp_path / "out")
    state.release()


def test_where_it_is_written(written: Written, parts, tmp_path: Path) -> None:
    folders = parts()
    with pytest.raises(fourfold.OutputError, match="lies inside a part's folder"):
        fourfold.merge(folders, folders[0] / "sub")
    with pytest.raises(fourfold.OutputError, match="not empty"):
        fourfold.merge(folders, tmp_path / "parts" / "whole")
    fourfold.merge(folders, tmp_path / "parts" / "whole", overwrite=True)
    fourfold.merge(folders, tmp_path / "again")
    assert_same(tmp_path / "parts" / "whole", tmp_path / "again")


def test_a_full_disk(parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, calls, pwrite = parts(), [0], os.pwrite

    def full(*arguments: Any) -> int:
        calls[0] += 1
        if calls[0] > 30:
            raise OSError(28, "No space left on device")
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(fourfold.OutputError, match="The disk is full"):
        fourfold.merge(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_that_cannot_be_read(parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part is named, not OUT."""
    folders = parts()
    digests = {
        name: record["digest"]
        for folder in folders
        for name, record in RunState(folder).finished_shards().items()
    }

    def broken(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("fourfold.run.merge.digest_of_file", lambda file: digests[file.name])
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(fourfold.SourceError, match=r"parts/\d/model-.*Input/output error"):
        fourfold.merge(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_summary_that_does_not_say_how(written: Written, tmp_path: Path) -> None:
    made = tmp_path / "made"
    fourfold.quantize(written("qwen3_moe")[0], made, W4A16)
    summary = json.loads((made / "quant_summary.json").read_text())
    outside = {"file": "../x", "unit": "shell", "layer": None, "jobs": [1]}
    for shards, message in (
        ([], "does not say how the shards were cut"),
        (None, r"quant_summary.json: shards: "),
        ([outside], r"quant_summary.json: shards.0.file: "),
    ):
        (made / "quant_summary.json").write_text(json.dumps(summary | {"shards": shards}))
        with pytest.raises(fourfold.SourceError, match=message):
            fourfold.merge([made], tmp_path / "out")


def test_files_that_were_added(written: Written, tmp_path: Path) -> None:
    """What somebody put beside the weights comes along; a link out of the folder does not."""
    made = tmp_path / "made"
    fourfold.quantize(written("qwen3_moe")[0], made, W4A16)
    (made / "sub").mkdir()
    (made / "sub" / "template.jinja").write_text("x")
    (made / "link").symlink_to("/etc/hostname")
    fourfold.merge([made], tmp_path / "out")
    assert (tmp_path / "out" / "sub" / "template.jinja").read_text() == "x"
    assert not (tmp_path / "out" / "link").exists()
    assert (
        "sub/template.jinja"
        in json.loads((tmp_path / "out/quant_summary.json").read_text())["files"]
    )
    summary = json.loads((made / "quant_summary.json").read_text())
    summary["files"].append("link")
    (made / "quant_summary.json").write_text(json.dumps(summary))
    with pytest.raises(fourfold.SourceError, match="a link out of its folder"):
        fourfold.merge([made], tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("identity", [{}, [], None, {"source": 7}])
def test_a_run_that_makes_no_sense(identity: object, parts, tmp_path: Path) -> None:
    folders = parts()
    file = folders[1] / ".fourfold" / "run.json"
    file.write_text(json.dumps({"files": [], "identity": identity}))
    with pytest.raises(fourfold.SourceError, match="does not describe a run that can be joined"):
        fourfold.merge(folders, tmp_path / "out")


def test_parts_that_can_only_be_read(parts, tmp_path: Path) -> None:
    folders = parts()
    for path in (tmp_path / "parts").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert fourfold.merge(folders, tmp_path / "out").report is not None


def test_cuts() -> None:
    """Even, in order, nothing lost, and never more parts than there are bundles."""
    bundle = {"x": ("BF16", (10,))}
    for count in (0, 1, 3, 10, 64):
        for parts in (1, 2, 3, 7, 100):
            pieces = list(cut([bundle] * count, parts))
            assert [begin for begin, _ in pieces[1:]] == [end for _, end in pieces[:-1]]
            assert sum(end - begin for begin, end in pieces) == count
            assert len(pieces) == min(parts, count)
            sizes = [end - begin for begin, end in pieces]
            assert not sizes or max(sizes) - min(sizes) <= 1
    nothing = {"x": ("BF16", (0,))}
    assert list(cut([nothing] * 3, 4)) == [(0, 3)]


def test_alone_is_the_one_rank() -> None:
    assert Ranks().gather({"a": 1}) == [{"a": 1}]

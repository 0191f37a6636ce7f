# SPDX-License-Identifier: Apache-2.0
"""A run that ended early goes on, and gives the bytes of one that was never stopped."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fourfold
from families import Truth
from fourfold.events import BytesQuantized, BytesVerified, Event, PlanMade, Resumed, ShardWritten
from fourfold.sources.safetensors import SafetensorsFolder
from fourfold.storage.output import OutputFolder
from fourfold.storage.run_state import RunState
from jobs import MODEL, W4A4, W4A16, assert_same, files_of, flat, ids_file, only, start

Written = Callable[[str], tuple[Path, Truth]]


@pytest.fixture(scope="module")
def job(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A recipe → the options of a job with it, what it writes, and how long that takes."""
    made: dict[str, tuple[dict[str, Any], Path, float]] = {}

    def make(recipe: str) -> tuple[dict[str, Any], Path, float]:
        if recipe not in made:
            folder = tmp_path_factory.mktemp("unbroken")
            options: dict[str, Any] = {"recipe": recipe, "threads": 1, "verify": False}
            if recipe == W4A4:
                options |= {"calib": [ids_file(folder)], "calib_seq": 24, "batch_size": 3}
            for name in ("out", "again"):  # the second run has everything warm
                begun = time.monotonic()
                process = start(written(MODEL)[0], folder / name, **options)
                process.join()
                assert process.exitcode == 0
            assert_same(folder / "out", folder / "again")
            made[recipe] = options, folder / "out", time.monotonic() - begun
        return made[recipe]

    return make


def kill_often(model: Path, job: Any, folder: Path, kills: int, seed: int) -> Iterator[Path]:
    """Kill a job at random moments and start it again, until it has been killed that often.

    Yields every folder that was finished after at least one kill.
    """
    options, _, seconds = job
    draw, number, killed = random.Random(seed), 0, 0
    while killed < kills:
        out, number, before = folder / str(number), number + 1, killed
        while True:
            process = start(model, out, **options)
            # A run that goes on has less to do: half of the moments lie early.
            process.join(draw.uniform(0, seconds * draw.choice((0.4, 1.1))))
            is_killed = process.exitcode is None and killed < kills
            if is_killed:
                process.kill()
                killed += 1
            process.join()
            if process.exitcode == 0:
                break
            assert is_killed, f"seed {seed}: exit code {process.exitcode} after {killed} kills"
            if was_whole(out):
                break
        if killed > before:
            yield out


def was_whole(out: Path) -> bool:
    """True if a job was killed when OUT was a checkpoint; then the rest of its state is removed."""
    if not (out / "config.json").exists():
        return False
    names = json.loads((out / "quant_summary.json").read_bytes())["files"]
    assert all((out / name).exists() for name in names)
    if (out / ".fourfold" / "run.json").exists():
        return False
    shutil.rmtree(out / ".fourfold", ignore_errors=True)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [W4A16, W4A4])
def test_killed_at_random_moments(recipe: str, job, written: Written, tmp_path: Path) -> None:
    """25 times for each recipe."""
    for out in kill_often(written(MODEL)[0], job(recipe), tmp_path, 25, 1):
        assert_same(out, job(recipe)[1])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [W4A16, W4A4])
def test_killed_at_many_random_moments(recipe: str, job, written: Written, tmp_path: Path) -> None:
    """250 times for each recipe."""
    for out in kill_often(written(MODEL)[0], job(recipe), tmp_path, 250, 2):
        assert_same(out, job(recipe)[1])
        shutil.rmtree(out)


@pytest.mark.parametrize("recipe", [W4A16, W4A4])
def test_killed_between_changes_of_the_disk(
    recipe: str, job, written: Written, tmp_path: Path
) -> None:
    """Before a change of the disk, and, when it goes on, before a later one."""
    options, unbroken, _ = job(recipe)
    number, out = 4, tmp_path / "out"
    while run(written(MODEL)[0], out, number, options):
        for kill_at in (number // 2, 0):
            if was_whole(out) or not run(written(MODEL)[0], out, kill_at, options):
                break
        assert_same(out, unbroken)
        shutil.rmtree(out)
        number += 2 + number // 2
    assert number > 100
    assert_same(out, unbroken)


def run(model: Path, out: Path, kill_at: int, options: dict[str, Any]) -> int:
    process = start(model, out, kill_at=kill_at, **options)
    process.join(60)
    assert process.exitcode in (0, -9)
    return int(process.exitcode)


def stopped(model: Path, out: Path, options: dict[str, Any], shards: int) -> None:
    """Leave a run that has finished so many shards."""

    def stop(progress: ShardWritten) -> None:
        if progress.shards_done == shards:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        fourfold.quantize(model, out, **flat(on_event=only(ShardWritten, stop), **options))
    without = ", without `overwrite=True`" if options.get("overwrite") else ""
    assert caught.value.__notes__[0].endswith(f"the same command resumes{without}.")


@pytest.mark.parametrize("recipe", [W4A16, W4A4])
def test_what_is_finished_is_not_made_again(
    recipe: str, job, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, unbroken = job(recipe)[0] | {"shards": 4}, tmp_path / "unbroken"
    model, out = written(MODEL)[0], tmp_path / "out"
    fourfold.quantize(model, unbroken, **flat(**options))
    stopped(model, out, options, 2)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert 2 <= len(before) <= 8  # some were on their way to the disk
    read = []
    slab = SafetensorsFolder.slab

    def counted(self: Any, key: str, *arguments: Any) -> Any:
        read.append(key)
        return slab(self, key, *arguments)

    monkeypatch.setattr(SafetensorsFolder, "slab", counted)
    events: list[Event] = []
    fourfold.quantize(model, out, **flat(on_event=events.append, **options))
    assert_same(out, unbroken)
    summary = json.loads((out / "quant_summary.json").read_bytes())["shards"]
    assert [event for event in events if isinstance(event, Resumed)] == [
        Resumed(len(before), len(summary))
    ]
    whole = [event for event in events if isinstance(event, BytesQuantized)]
    assert 0 < whole[0].bytes_done < whole[0].bytes_total  # where it stands in the whole
    assert whole[-1].bytes_done == whole[-1].bytes_total
    written_now = [event for event in events if isinstance(event, ShardWritten)]
    assert len(written_now) == len(summary) - len(before)
    assert all((out / name).stat().st_mtime_ns == then for name, then in before.items())
    left = {shard["layer"] for shard in summary if shard["file"] not in before}
    finished = {shard["layer"] for shard in summary} - left
    assert finished
    assert not [key for key in read for layer in finished if f"layers.{layer}." in key]


def test_all_that_was_left_is_the_end(job, written: Written, tmp_path: Path, monkeypatch) -> None:
    """With every shard and all statistics there, no weight is read and no model is run."""
    options, unbroken, _ = job(W4A4)
    model, out = written(MODEL)[0], tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("fourfold.api.write_own_files", raise_full)
        with pytest.raises(fourfold.OutputError):
            fourfold.quantize(model, out, **flat(**options))
    monkeypatch.setattr(SafetensorsFolder, "slab", None)
    fourfold.quantize(model, out, **flat(**options))
    assert_same(out, unbroken)


def raise_full(*_: object, **__: object) -> None:
    raise fourfold.OutputError("OUT: the disk is full")


def test_a_side_file_that_cannot_be_read(
    job, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the source's file that is named; what is finished stays."""
    options, unbroken, _ = job(W4A16)
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(written(MODEL)[0], model)
    (model / "notes.txt").write_text("x")

    class Broken(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise OSError(5, "Input/output error")

    def broken(path: Path, *mode: Any, **given: Any) -> Any:
        return Broken() if path == model / "notes.txt" else opened(path, *mode, **given)

    opened = Path.open
    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(fourfold.SourceError, match=r"model/notes\.txt: cannot be read: Input"):
        fourfold.quantize(model, out, **flat(**options))
    monkeypatch.undo()
    assert not (out / "config.json").exists()
    fourfold.quantize(model, out, **flat(**options))
    assert files_of(out).keys() == files_of(unbroken).keys() | {"notes.txt"}


def spoil_shard(out: Path) -> None:
    with next(iter(sorted(out.glob("*.safetensors")))).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def truncate_shard(out: Path) -> None:
    file = next(iter(sorted(out.glob("*.safetensors"))))
    os.truncate(file, file.stat().st_size // 2)


def remove_shard(out: Path) -> None:
    next(iter(sorted(out.glob("*.safetensors")))).unlink()


def record_of(out: Path) -> Path:
    """The record of a finished shard."""
    return next(iter(sorted((out / ".fourfold" / "shards").iterdir())))


def remove_record(out: Path) -> None:
    record_of(out).unlink()


def tear_record(out: Path) -> None:
    os.truncate(record_of(out), record_of(out).stat().st_size - 20)


def empty_record(out: Path) -> None:
    record_of(out).write_bytes(b"")


def garble_record(out: Path) -> None:
    record_of(out).write_bytes(b"\xff\x00 garbage")


def list_as_record(out: Path) -> None:
    record_of(out).write_bytes(b"[1]")


def record_without_digest(out: Path) -> None:
    record_of(out).write_bytes(b'{"linears": []}')


def record_of_another_file(out: Path) -> None:
    record_of(out).rename(out / ".fourfold" / "shards" / "model-1.safetensors.json")


def leave_partial(out: Path) -> None:
    for name in ("model-00004-of-00004.safetensors", "config.json", "report.html"):
        (out / f".{name}.partial").write_bytes(b"half")


SPOILERS = [
    spoil_shard, truncate_shard, remove_shard, remove_record, tear_record, empty_record,
    garble_record, list_as_record, record_without_digest, record_of_another_file, leave_partial,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILERS)
def test_what_is_torn_is_made_again(
    spoil: Callable[[Path], None], job, written: Written, tmp_path: Path
) -> None:
    options, unbroken, _ = job(W4A16)
    model, out = written(MODEL)[0], tmp_path / "out"
    stopped(model, out, options, 2)
    spoil(out)
    fourfold.quantize(model, out, **flat(**options))
    assert_same(out, unbroken)


def touched(model: Path, options: dict[str, Any]) -> None:
    file = model / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


CHANGES: dict[str, tuple[Callable[[Path, dict[str, Any]], Any], str]] = {
    "recipe": (
        lambda model, options: options.update(recipe="w4a16_nvfp4_experts_only"),
        r"recipe\.name: w4a16_nvfp4_experts_only_mse → w4a16_nvfp4_experts_only",
    ),
    "source": (touched, r"source\.files\.model\.safetensors"),
    "shards": (
        lambda model, options: options.update(shards=2),
        "shards.for each layer: 1 → 2",
    ),
    "side file": (
        lambda model, options: (model / "vocab.json").write_text("{}"),
        r"source\.files\.vocab\.json: null → \[2,",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_another_job_does_not_go_on(change: str, job, written: Written, tmp_path: Path) -> None:
    """It says what changed, and touches nothing; `overwrite` starts anew."""
    options = dict(job(W4A16)[0])
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(written(MODEL)[0], model)
    stopped(model, out, options, 2)
    before = files_of(out)
    make, words = CHANGES[change]
    make(model, options)
    with pytest.raises(fourfold.OutputError, match=words) as caught:
        fourfold.quantize(model, out, **flat(**options))
    assert "unfinished run of something else" in str(caught.value)
    assert "`overwrite=True` to start over" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2
    assert files_of(out) == before
    fourfold.quantize(model, out, **flat(overwrite=True, **options))
    fourfold.quantize(model, tmp_path / "other", **flat(**options))
    assert_same(out, tmp_path / "other")


def test_another_version_does_not_go_on(
    job, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = job(W4A16)[0]
    model, out = written(MODEL)[0], tmp_path / "out"
    stopped(model, out, options, 2)
    monkeypatch.setattr("fourfold.reporting.summary.__version__", "9.9")
    with pytest.raises(fourfold.OutputError, match=r"versions\.fourfold: .* → 9\.9"):
        fourfold.quantize(model, out, **flat(**options))


def test_other_calibration_does_not_go_on(job, written: Written, tmp_path: Path) -> None:
    options = job(W4A4)[0]
    model, out = written(MODEL)[0], tmp_path / "out"
    stopped(model, out, options, 2)
    with pytest.raises(fourfold.OutputError, match=r"calibration\.data\.digest: .* → "):
        fourfold.quantize(model, out, **flat(**options | {"calib_seq": 20}))
    with pytest.raises(fourfold.OutputError, match=r"calibration\.threads: 1 → 2"):
        fourfold.quantize(model, out, **flat(**options | {"threads": 2}))


def test_a_run_that_finished_nothing_binds_nobody(job, written: Written, tmp_path: Path) -> None:
    """Killed before its first shard: whatever comes next starts anew."""
    options, unbroken, _ = job(W4A16)
    model, out = written(MODEL)[0], tmp_path / "out"
    process = start(model, out, kill_at=10, **options | {"recipe": "w4a16_nvfp4_experts_only"})
    process.join()
    assert process.exitcode == -9
    assert (out / ".fourfold" / "run.json").exists()
    fourfold.quantize(model, out, **flat(**options))
    assert_same(out, unbroken)


def test_statistics_that_are_given_go_on_too(job, written: Written, tmp_path: Path) -> None:
    _, unbroken, _ = job(W4A4)
    given = {
        "recipe": W4A4, "verify": False, "calibration": unbroken / "calibration.safetensors",
    }  # fmt: skip
    model, out = written(MODEL)[0], tmp_path / "out"
    stopped(model, out, given | {"threads": 1}, 2)
    fourfold.quantize(model, out, **flat(threads=2, **given))  # the bytes do not depend on threads
    assert_same(out, unbroken)


def test_threads_are_those_that_a_run_began_with(job, written: Written, tmp_path: Path) -> None:
    """Matrix products may depend on them; nobody has to remember them."""
    options = job(W4A4)[0] | {"threads": 2}
    model, out = written(MODEL)[0], tmp_path / "out"
    stopped(model, out, options, 2)
    del options["threads"]
    resumed: list[Resumed] = []
    fourfold.quantize(model, out, **flat(on_event=only(Resumed, resumed.append), **options))
    assert resumed
    fourfold.quantize(model, tmp_path / "other", **flat(threads=2, **options))
    assert_same(out, tmp_path / "other")


def test_a_command_that_overwrites_is_told(job, written: Written, tmp_path: Path) -> None:
    options = job(W4A16)[0] | {"overwrite": True}
    stopped(written(MODEL)[0], tmp_path / "out", options, 2)


def test_two_processes_on_one_folder(job, written: Written, tmp_path: Path) -> None:
    """The second names the first, and changes nothing; the lock ends with its process."""
    options, unbroken, _ = job(W4A16)
    model, out = written(MODEL)[0], tmp_path / "out"
    first = RunState(out)
    first.lock("token")
    for overwrite in (False, True):
        with pytest.raises(fourfold.OutputError) as caught:
            fourfold.quantize(model, out, **flat(overwrite=overwrite, **options))
        text = str(caught.value)
        assert f"process {os.getpid()} on {os.uname().nodename} is writing it." in text
        assert "Wait for it, stop it, or choose another folder." in text
    state = [".fourfold", "rank-00000.json", "rank-00000.lock"]
    assert sorted(path.name for path in out.rglob("*")) == state
    first.release()
    fourfold.quantize(model, out, **flat(**options))
    assert_same(out, unbroken)


def test_processes_that_start_at_once(job, written: Written, tmp_path: Path) -> None:
    """One of them writes; whoever comes while it does is refused."""
    options, unbroken, _ = job(W4A16)
    model, out = written(MODEL)[0], tmp_path / "out"
    processes = [start(model, out, **options) for _ in range(4)]
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    assert codes.count(0) >= 1
    assert set(codes) <= {0, 1}
    assert_same(out, unbroken)


def test_the_last_moments_of_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that starts while another removes its state loses nothing of its own."""
    first, second = RunState(tmp_path), RunState(tmp_path)
    first.lock("first")
    first.begin({"files": []})
    first.add_shard("one", {})
    unlink = Path.unlink

    def take_it(path: Path, **options: Any) -> None:
        unlink(path, **options)
        if path.name == "rank-00000.lock":
            monkeypatch.undo()
            second.lock("second")
            second.begin({"files": ["mine"]})
            second.add_shard("two", {})

    monkeypatch.setattr(Path, "unlink", take_it)
    first.remove()
    assert second.is_mine
    assert not first.is_mine
    assert second.run == {"files": ["mine"]}
    assert second.finished_shards() == {"two": {}}
    second.remove()
    assert not second.folder.exists()
    assert tmp_path.is_dir()


def test_ranks_remove_the_state_together(tmp_path: Path) -> None:
    """After an error that no run could resume from, every rank of a folder does."""
    for _ in range(100):
        folders = [OutputFolder(tmp_path / "out", rank) for rank in range(4)]
        for folder in folders:
            folder.lock("token")
        folders[0].begin(None, ["a.safetensors", "b.safetensors"])
        for name in "abcdefgh":
            folders[0].state.add_shard(f"{name}.safetensors", {})
        with ThreadPoolExecutor(len(folders)) as pool:
            list(pool.map(count_and_discard, folders))
        assert not (tmp_path / "out").exists()


def count_and_discard(folder: OutputFolder) -> None:
    folder.state.finished_shards()
    folder.discard()


def test_a_state_that_goes_before_its_lock_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the folder and the lock in it, another process may take the folder away."""
    state, mkdir = RunState(tmp_path), Path.mkdir

    def too_late(path: Path, **options: Any) -> None:
        mkdir(path, **options)
        monkeypatch.undo()
        path.rmdir()

    monkeypatch.setattr(Path, "mkdir", too_late)
    state.lock("token")
    assert state.is_mine
    state.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken_away(job, written: Written, tmp_path: Path) -> None:
    """A run ends when its OUT was removed, and touches nothing that another wrote there since."""
    options, unbroken, _ = job(W4A16)
    model, out = written(MODEL)[0], tmp_path / "out"

    def replace(progress: Any) -> None:
        if progress.shards_done == 2:
            shutil.rmtree(out)
            process = start(model, out, **options)
            process.join()
            assert process.exitcode == 0

    with pytest.raises(fourfold.OutputError, match="removed or moved away while it was written"):
        fourfold.quantize(model, out, **flat(on_event=only(ShardWritten, replace), **options))
    assert_same(out, unbroken)


def test_a_checkpoint_that_appears_meanwhile(job, written: Written, tmp_path: Path) -> None:
    """What was empty when the command began is looked at again when the folder is locked."""
    options, unbroken, _ = job(W4A16)
    model, out = written(MODEL)[0], tmp_path / "out"

    def write_meanwhile(_: PlanMade) -> None:
        process = start(model, out, **options)
        process.join()
        assert process.exitcode == 0

    other = options | {"recipe": "w4a16_nvfp4_experts_only"}
    with pytest.raises(fourfold.OutputError, match="not empty"):
        fourfold.quantize(model, out, on_event=only(PlanMade, write_meanwhile), **flat(**other))
    assert_same(out, unbroken)


def test_a_checkpoint_about_to_be_replaced(job, written: Written, tmp_path: Path) -> None:
    """Killed before `--overwrite` has removed anything, it is as well protected as before."""
    options, unbroken, _ = job(W4A16)
    model, out = written(MODEL)[0], tmp_path / "out"
    fourfold.quantize(model, out, **flat(**options))
    number, before = 1, files_of(out)
    while True:
        process = start(model, out, kill_at=number, overwrite=True, **options)
        process.join()
        assert process.exitcode == -9
        if not (out / "config.json").exists():
            break
        assert {name: data for name, data in files_of(out).items() if name in before} == before
        with pytest.raises(fourfold.OutputError, match="not empty"):
            fourfold.quantize(model, out, **flat(**options))
        number += 1
    assert number > 3
    fourfold.quantize(model, out, **flat(**options))
    assert_same(out, unbroken)


def test_a_run_that_is_stopped_while_it_verifies(job, written: Written, tmp_path: Path) -> None:
    """The checkpoint is whole; the same call says how to make up for the verification."""
    options = job(W4A16)[0] | {"verify": True}
    model, out = written(MODEL)[0], tmp_path / "out"

    def stop(_: BytesVerified) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fourfold.quantize(model, out, **flat(on_event=only(BytesVerified, stop), **options))
    remedy = re.escape("`fourfold verify`, with `source=MODEL`. Choose another folder, or give")
    with pytest.raises(fourfold.OutputError, match=rf"not empty .* while it verified.*{remedy}"):
        fourfold.quantize(model, out, **flat(**options))
    assert fourfold.verify(out, source=model).clean


def test_the_rest_of_a_state_beside_a_checkpoint(job, written: Written, tmp_path: Path) -> None:
    """Killed while it removes its state, a run leaves a checkpoint that is as good as any."""
    options, unbroken, _ = job(W4A16)
    model, out, rest = written(MODEL)[0], tmp_path / "out", tmp_path / "rest"
    stopped(model, out, options, 2)
    shutil.copytree(out / ".fourfold", rest)
    (rest / "run.json").unlink()
    fourfold.quantize(model, out, **flat(**options))
    shutil.copytree(rest, out / ".fourfold")
    assert fourfold.verify(out, source=model).clean
    fourfold.load(out)
    fourfold.merge([out], tmp_path / "merged", verified=False)  # as the job: the card says so
    assert_same(tmp_path / "merged", unbroken)
    with pytest.raises(fourfold.OutputError, match=r"not empty .* or give `overwrite=True`"):
        fourfold.quantize(model, out, **flat(**options))
    fourfold.quantize(model, out, **flat(overwrite=True, **options))
    assert not (out / ".fourfold").exists()
    assert_same(out, unbroken)


def test_statistics_that_cannot_be_read(job, written: Written, tmp_path: Path) -> None:
    """The layer is observed again."""
    options, unbroken, _ = job(W4A4)
    model, out = written(MODEL)[0], tmp_path / "out"
    stopped(model, out, options, 2)
    files = sorted((out / ".fourfold" / "statistics").iterdir())
    assert [file.name for file in files[:2]] == [
        "layer-00000.safetensors",
        "layer-00001.safetensors",
    ]
    os.truncate(files[1], 100)
    fourfold.quantize(model, out, **flat(**options))
    assert_same(out, unbroken)


@pytest.mark.parametrize(
    "text",
    ["", "garbage", "[]", "{}", '{"files": 7, "identity": []}', '{"identity": {"shards": 1}}'],
)
def test_a_run_that_nobody_can_read(text: str, job, written: Written, tmp_path: Path) -> None:
    """It is not gone on with, and the remedy is one."""
    options = job(W4A16)[0]
    model, out = written(MODEL)[0], tmp_path / "out"
    stopped(model, out, options, 2)
    (out / ".fourfold" / "run.json").write_text(text)
    before = files_of(out)
    for overwrite in (False, True):
        with pytest.raises(fourfold.OutputError, match="empty this one yourself"):
            fourfold.quantize(model, out, **flat(overwrite=overwrite, **options))
    assert files_of(out) == before


def test_a_shard_that_became_a_link(job, written: Written, tmp_path: Path) -> None:
    options, unbroken, _ = job(W4A16)
    model, out = written(MODEL)[0], tmp_path / "out"
    stopped(model, out, options, 2)
    shard = next(iter(sorted(out.glob("*.safetensors"))))
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    fourfold.quantize(model, out, **flat(**options))
    assert not shard.is_symlink()
    assert_same(out, unbroken)


def test_clocks_do_not_matter(job, written: Written, tmp_path: Path) -> None:
    """Files of the future and of 1970, in the source and among what is finished."""
    options = job(W4A16)[0]
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(written(MODEL)[0], model)
    for number, path in enumerate(sorted(model.iterdir())):
        os.utime(path, (0, 0) if number % 2 else (4e9, 4e9))
    stopped(model, out, options, 2)
    for number, path in enumerate(sorted(out.rglob("*"))):
        os.utime(path, (4e9, 4e9) if number % 2 else (0, 0))
    resumed: list[Resumed] = []
    fourfold.quantize(model, out, **flat(on_event=only(Resumed, resumed.append), **options))
    assert resumed
    fourfold.quantize(model, tmp_path / "other", **flat(**options))
    assert_same(out, tmp_path / "other")


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_source_that_changes_meanwhile(how: str, job, written: Written, tmp_path: Path) -> None:
    """The run ends with that, before config.json; it does not go on with another source."""
    options = job(W4A16)[0]
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(written(MODEL)[0], model)

    def change(progress: Any) -> None:
        if progress.shards_done == 1:
            if how == "gone":
                (model / "model.safetensors").rename(tmp_path / "elsewhere")
            else:
                touched(model, options)

    with pytest.raises(fourfold.SourceError, match=r"model\.safetensors: (changed|disappeared)"):
        fourfold.quantize(model, out, **flat(on_event=only(ShardWritten, change), **options))
    assert not list(out.glob("*.json"))
    if how == "changed":
        with pytest.raises(fourfold.OutputError, match="Changed since"):
            fourfold.quantize(model, out, **flat(**options))

# SPDX-License-Identifier: Apache-2.0
"""A model on the hub is quantized without room for it, whatever breaks on the way."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import fourfold
from families import FAMILIES, write_checkpoint
from fourfold.config import CalibrationConfig, OutputConfig, Runtime
from fourfold.errors import FourfoldError, OutputError, ResourceError, SourceError
from fourfold.events import BytesQuantized, Event, ShardWritten
from fourfold.sources.safetensors import open_source
from fourfold.storage.safetensors_header import read_header
from jobs import W4A4, W4A16, ids_file, only, start_command

from .conftest import client_settings
from .helpers import HEADER, NAME, message_of, shards_in, sizes_of, tensors_of
from .models import SHARDS, write_forty
from .stand_in import Hub

STREAMED = Runtime(threads=2, keep_source=False)
WINDOW = 3
SEQUENTIAL = "nvfp4_default_best"


class Stop(Exception):
    """Ends a run from within."""


@pytest.fixture(scope="module")
def expected(forty: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A recipe → options, and OUT and result of a run on the folder."""
    done: dict[str, Any] = {}

    def run(recipe: str) -> Any:
        if recipe not in done:
            folder = tmp_path_factory.mktemp("expected")
            options: dict[str, Any] = {"recipe": recipe}
            if recipe != W4A16:
                options["calibration"] = CalibrationConfig(
                    calib=[ids_file(folder)], calib_seq=16, calib_size=4
                )
            threads = 2 if recipe == SEQUENTIAL else 1  # a run in float32 depends on them
            runtime = Runtime(threads=threads)
            result = fourfold.quantize(forty, folder / "out", runtime=runtime, **options)
            done[recipe] = options, folder / "out", result
        return done[recipe]

    return run


def asking(hub: Hub, home: Path) -> str:
    """Code that makes a process ask the stand-in.

    A process that was forked must set PyTorch's threads before several of its threads do at once.
    """
    return f"""
import torch
from huggingface_hub import constants
torch.set_num_threads(1)
for name, value in {client_settings(hub, home)!r}.items():
    setattr(constants, name, value)
"""


def fetched(hub: Hub, model: Path) -> dict[str, float]:
    """How often each shard was sent, without the beginnings that a plan asks for."""
    sizes = sizes_of(model)
    return {name: max(0, hub.sent[name] - HEADER) / size for name, size in sizes.items()}


def needed_room(expected: Path, model: Path, shards: int = WINDOW) -> int:
    """Bytes of an output, of some shards, and of the files that a run keeps beside them."""
    output = sum(path.stat().st_size for path in expected.rglob("*") if path.is_file())
    return output + shards * max(sizes_of(model).values()) + (2 << 20)


@pytest.mark.parametrize("recipe", [W4A16, W4A4, pytest.param(SEQUENTIAL, marks=pytest.mark.slow)])
def test_three_shards_at_a_time(
    recipe: str, hub: Hub, forty: Path, expected: Any, tmp_path: Path
) -> None:
    """The bytes and the report are those of the folder. Shards come once, and some twice, where
    workers wait for each other; nothing is fetched again for verification."""
    hub.add(NAME, forty)
    options, out, result = expected(recipe)
    most: list[int] = []

    def look(event: Event) -> None:
        most.append(len(shards_in(tmp_path / "out")))

    streamed = fourfold.quantize(
        NAME, tmp_path / "out", runtime=STREAMED, on_event=only(BytesQuantized, look), **options
    )
    assert tensors_of(tmp_path / "out") == tensors_of(out)
    assert streamed.report is not None
    assert streamed.report.clean
    assert streamed.report.relative_errors == result.report.relative_errors
    assert streamed.report.counts.copied_tensors == result.report.counts.copied_tensors
    assert 0 < max(most) <= WINDOW
    assert not (tmp_path / "out" / ".fourfold").exists()
    assert sum(fetched(hub, forty).values()) < 2 * SHARDS
    cached = (tmp_path / "home").rglob("*.safetensors")
    assert [*cached] == []
    assert any("deleted once they are quantized" in note for note in streamed.plan.notes)


def test_kept_in_the_cache(hub: Hub, forty: Path, expected: Any, tmp_path: Path) -> None:
    hub.add(NAME, forty)
    _, out, result = expected(W4A16)
    kept = fourfold.quantize(NAME, tmp_path / "out", W4A16, runtime=Runtime(threads=2))
    assert tensors_of(tmp_path / "out") == tensors_of(out)
    assert kept.report is not None
    assert kept.report.relative_errors == result.report.relative_errors
    assert len([*(tmp_path / "home").rglob("snapshots/*/*.safetensors")]) == SHARDS
    hub.forget()
    again = fourfold.quantize(NAME, tmp_path / "again", W4A16, runtime=STREAMED)
    assert hub.weights_sent() == 0
    assert len([*(tmp_path / "home").rglob("snapshots/*/*.safetensors")]) == SHARDS
    assert any("in the hub's cache already" in note for note in again.plan.notes)


def test_shards_in_the_cache_are_used_and_stay(
    hub: Hub, forty: Path, expected: Any, tmp_path: Path
) -> None:
    from huggingface_hub import hf_hub_download

    commit = hub.add(NAME, forty)
    names = sorted(sizes_of(forty))[3:30:4]
    paths = [Path(hf_hub_download(NAME, name, revision=commit)) for name in names]
    hub.forget()
    fourfold.quantize(NAME, tmp_path / "out", W4A16, runtime=STREAMED)
    assert tensors_of(tmp_path / "out") == tensors_of(expected(W4A16)[1])
    assert all(path.exists() for path in paths)
    assert all(hub.sent[name] == 0 for name in names)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("qwen3_vl_moe", torch.bfloat16),  # fused experts, and a tower that calibration skips
        ("gpt_oss", torch.bfloat16),  # biases that are split by expert
        ("deepseek_v3", torch.float32),  # MTP layers; rounded while they are read
    ],
)
def test_families(family: str, dtype: torch.dtype, hub: Hub, tmp_path: Path) -> None:
    write_checkpoint(FAMILIES[family], tmp_path / "model", shards=5, dtype=dtype)
    hub.add(NAME, tmp_path / "model")
    options: dict[str, Any] = {
        "dtype": "bfloat16" if dtype == torch.float32 else None,
        "calibration": CalibrationConfig(calib=[ids_file(tmp_path)], calib_seq=24),
    }
    result = fourfold.quantize(tmp_path / "model", tmp_path / "expected", W4A4, **options)
    streamed = fourfold.quantize(NAME, tmp_path / "out", W4A4, runtime=STREAMED, **options)
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "expected")
    assert streamed.report is not None
    assert result.report is not None
    assert streamed.report.clean
    assert streamed.report.findings == result.report.findings
    assert streamed.report.relative_errors == result.report.relative_errors


def test_a_decoded_source(hub: Hub, tmp_path: Path) -> None:
    write_forty(tmp_path / "model", layers=4, fp8=True)
    hub.add(NAME, tmp_path / "model")
    fourfold.quantize(tmp_path / "model", tmp_path / "expected", W4A16)
    result = fourfold.quantize(NAME, tmp_path / "out", W4A16, runtime=STREAMED)
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "expected")
    assert result.report is not None
    assert result.report.clean
    assert sum(fetched(hub, tmp_path / "model").values()) < 2 * SHARDS


KEPT_FP8 = """
rules:
  - {roles: [experts], weights: {format: nvfp4, scale: max}, activations: {format: nvfp4}}
  - names: ["*.o_proj"]
    weights: {format: fp8_block, scale: max}
    activations: {format: fp8_block}
"""


def test_codes_that_are_kept_after_calibration(hub: Hub, tmp_path: Path) -> None:
    """Calibration reads values, and the layer's jobs its codes, before the shards are deleted."""
    write_forty(tmp_path / "model", layers=20, experts=4, fp8=True)
    hub.add(NAME, tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(KEPT_FP8)
    calibration = CalibrationConfig(calib=[ids_file(tmp_path)], calib_seq=16, calib_size=4)
    fourfold.quantize(tmp_path / "model", tmp_path / "expected", recipe, calibration=calibration)
    runtime = Runtime(threads=1, keep_source=False)
    fourfold.quantize(NAME, tmp_path / "out", recipe, calibration=calibration, runtime=runtime)
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "expected")
    assert sum(fetched(hub, tmp_path / "model").values()) < 1.2 * SHARDS


# ----------------------------------------------------------------------------- little room


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [W4A16, W4A4])
def test_a_small_disk_a_kill_and_broken_transfers(
    recipe: str,
    hub: Hub,
    forty: Path,
    expected: Any,
    small_disk: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    """Room for the output and three shards is enough, also for the hub's cache beside them."""
    hub.add(NAME, forty)
    options, out, _ = expected(recipe)
    disk = small_disk(needed_room(out, forty))
    names = sorted(sizes_of(forty))
    hub.breaks = {name: [150_000, 20_000] for name in names[::5]}
    hub.pause = 0.01
    before = asking(hub, disk / "home")
    words: list[object] = ["quantize", NAME, disk / "out", "--recipe", recipe, "--threads", 2]
    if recipe == W4A4:
        calib = options["calibration"]
        words += ["--calib", calib.calib[0], "--calib-seq", 16, "--calib-size", 4]
    with start_command(*words, before=before) as process:
        while process.poll() is None and len(finished_in(disk / "out")) < 4:
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = source_shards_of(disk / "out", forty)
    assert done
    assert shards_in(disk / "out")
    hub.pause = 0.0
    hub.forget()
    hub.breaks = {name: [100_000] for name in names[2::7]}
    with start_command(*words, before=before) as process:
        stdout, stderr = process.communicate(300)
    assert process.returncode == 0, stderr
    assert "resuming an unfinished run" in stdout + stderr
    assert "clean" in stdout + stderr
    assert tensors_of(disk / "out") == tensors_of(out)
    again = {name for name, times in fetched(hub, forty).items() if times > 0.2}
    assert not again & (done - {names[0], names[-1]})  # embedding, and norm, are read at first
    assert hub.ranges


def finished_in(out: Path) -> list[str]:
    """The shards of OUT that are finished."""
    return [path.stem for path in out.glob(".fourfold/shards/*.json")]


def source_shards_of(out: Path, model: Path) -> set[str]:
    """The source's shards of which no tensor is needed by an unfinished shard of OUT."""
    written: set[str] = set()
    for name in finished_in(out):
        written |= {key.rpartition(".")[0] for key in read_header(out / name)}
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    unfinished = {shard for key, shard in index.items() if key.rpartition(".")[0] not in written}
    return set(index.values()) - unfinished


def test_the_default_follows_the_room(
    hub: Hub,
    forty: Path,
    expected: Any,
    small_disk: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from huggingface_hub import constants

    hub.add(NAME, forty)
    disk = small_disk(needed_room(expected(W4A16)[1], forty))
    monkeypatch.chdir(disk)
    assert any("kept in the hub's cache" in note for note in fourfold.plan(NAME).notes)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(disk / "hub"))
    assert any("deleted once" in note for note in fourfold.plan(NAME).notes)
    keep = Runtime(keep_source=True)
    message = message_of(
        lambda: fourfold.quantize(NAME, disk / "out", W4A16, runtime=keep), ResourceError
    )
    assert "are needed" in message
    assert not (disk / "out").exists()


def test_too_little_room_for_three_shards(
    hub: Hub,
    forty: Path,
    expected: Any,
    small_disk: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    hub.add(NAME, forty)
    disk = small_disk(needed_room(expected(W4A16)[1], forty, shards=0) - (2 << 20))
    message = message_of(
        lambda: fourfold.quantize(NAME, disk / "out", W4A16, runtime=STREAMED), ResourceError
    )
    assert "of them for shards of the source" in message
    monkeypatch.chdir(disk)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(disk / "hub"))
    assert any("for shards of the source" in note for note in fourfold.plan(NAME).notes)


def test_an_open_source_may_be_read_again(
    hub: Hub, forty: Path, expected: Any, tmp_path: Path
) -> None:
    """One run deletes its shards, the next one keeps them, and the third one finds them."""
    hub.add(NAME, forty)
    with closing(open_source(NAME)) as source:
        for number, keep in enumerate((False, True, False)):
            runtime = Runtime(threads=2, keep_source=keep)
            fourfold.quantize(source, tmp_path / f"out{number}", W4A16, runtime=runtime)
            assert tensors_of(tmp_path / f"out{number}") == tensors_of(expected(W4A16)[1])
            assert len([*(tmp_path / "home").rglob("snapshots/*/*.safetensors")]) == (
                SHARDS if number else 0
            )


# --------------------------------------------------------------------------- what may break


def test_a_revision_that_moves(hub: Hub, forty: Path, expected: Any, tmp_path: Path) -> None:
    """The commit is that of the beginning, also for a run that resumes."""
    first = hub.add(NAME, forty)
    write_forty(tmp_path / "moved", layers=4)

    def move(event: ShardWritten) -> None:
        if hub.models[NAME].main == first:
            hub.add(NAME, tmp_path / "moved")
        if event.shards_done == 3:
            raise Stop

    with pytest.raises(Stop):
        fourfold.quantize(
            NAME, tmp_path / "out", W4A16, runtime=STREAMED, on_event=only(ShardWritten, move)
        )
    assert hub.models[NAME].main != first
    result = fourfold.quantize(NAME, tmp_path / "out", W4A16, runtime=STREAMED)
    assert tensors_of(tmp_path / "out") == tensors_of(expected(W4A16)[1])
    assert any(first in note for note in result.plan.notes)
    moved = OutputConfig(overwrite=True)
    result = fourfold.quantize(NAME, tmp_path / "out", W4A16, runtime=STREAMED, output=moved)
    assert any(hub.models[NAME].main in note for note in result.plan.notes)


def test_another_commit_does_not_resume(hub: Hub, forty: Path, tmp_path: Path) -> None:
    hub.add(NAME, forty)

    def stop(event: Event) -> None:
        raise Stop

    with pytest.raises(Stop):
        fourfold.quantize(
            NAME, tmp_path / "out", W4A16, runtime=STREAMED, on_event=only(ShardWritten, stop)
        )
    write_forty(tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("New.")
    commit = hub.add(NAME, tmp_path / "moved")
    with pytest.raises(OutputError, match=r"unfinished run of something else.*README"):
        fourfold.quantize(f"{NAME}@{commit}", tmp_path / "out", W4A16, runtime=STREAMED)


@pytest.mark.parametrize("keep", [True, False])
def test_transfers_that_break_and_arrive_damaged(
    keep: bool, hub: Hub, forty: Path, expected: Any, tmp_path: Path
) -> None:
    hub.add(NAME, forty)
    names = sorted(sizes_of(forty))
    hub.breaks = {names[4]: [10, 200_000], names[9]: [0]}
    runtime = Runtime(threads=2, keep_source=keep)
    fourfold.plan(NAME)  # the headers are asked for before anything breaks
    hub.refuses[names[12]] = 0 if keep else 1
    if not keep:
        hub.spoils[names[20]] = 1
    fourfold.quantize(NAME, tmp_path / "out", W4A16, runtime=runtime)
    assert tensors_of(tmp_path / "out") == tensors_of(expected(W4A16)[1])
    assert {name for name, start in hub.ranges} >= {names[4]}


@pytest.mark.slow
def test_a_shard_that_always_arrives_damaged(hub: Hub, forty: Path, tmp_path: Path) -> None:
    hub.add(NAME, forty)
    name = sorted(sizes_of(forty))[20]
    hub.spoils[name] = 1000
    message = message_of(
        lambda: fourfold.quantize(NAME, tmp_path / "out", W4A16, runtime=STREAMED), SourceError
    )
    assert f"{NAME}: {name}: cannot be fetched" in message
    assert "SHA-256" in message
    hub.spoils.clear()
    hub.forget()
    result = fourfold.quantize(NAME, tmp_path / "out", W4A16, runtime=STREAMED)
    assert result.report is not None
    assert result.report.clean
    assert sum(fetched(hub, forty).values()) < SHARDS - 10


@pytest.mark.slow
def test_a_hub_that_goes_away(hub: Hub, forty: Path, expected: Any, tmp_path: Path) -> None:
    """After some attempts, one line says that the same command resumes, and it does."""
    hub.add(NAME, forty)
    names = sorted(sizes_of(forty))

    def leave(event: Event) -> None:
        hub.refuses.update(dict.fromkeys(names, 1000))

    with pytest.raises(SourceError) as caught:
        fourfold.quantize(
            NAME, tmp_path / "out", W4A16, runtime=STREAMED, on_event=only(ShardWritten, leave)
        )
    assert "The same command resumes" in str(caught.value)
    assert any("keeps" in note for note in caught.value.__notes__)
    hub.refuses.clear()
    fourfold.quantize(NAME, tmp_path / "out", W4A16, runtime=STREAMED)
    assert tensors_of(tmp_path / "out") == tensors_of(expected(W4A16)[1])


def test_nothing_is_left_of_a_run_that_finished_no_shard(
    hub: Hub, forty: Path, tmp_path: Path
) -> None:
    hub.add(NAME, forty)
    hub.refuses.update({sorted(sizes_of(forty))[0]: 0})
    fourfold.plan(NAME)

    def stop(event: BytesQuantized) -> None:
        if event.bytes_done:
            raise Stop

    with pytest.raises(Stop):
        fourfold.quantize(
            NAME, tmp_path / "out", W4A16, runtime=STREAMED, on_event=only(BytesQuantized, stop)
        )
    assert not (tmp_path / "out").exists()


def test_what_other_runs_left_is_removed(hub: Hub, forty: Path, tmp_path: Path) -> None:
    commit = hub.add(NAME, forty)
    source = tmp_path / "out" / ".fourfold" / "source"

    def stop(event: Event) -> None:
        raise Stop

    with pytest.raises(Stop):
        fourfold.quantize(
            NAME, tmp_path / "out", W4A16, runtime=STREAMED, on_event=only(ShardWritten, stop)
        )
    (source / "other").mkdir()
    (source / "other" / "shard").write_bytes(b"old")
    (source / commit / "model-00000.safetensors").write_bytes(b"old")

    def look(event: Event) -> None:
        assert [path.name for path in source.iterdir()] == [commit]
        assert not (source / commit / "model-00000.safetensors").exists()

    fourfold.quantize(
        NAME, tmp_path / "out", W4A16, runtime=STREAMED, on_event=only(ShardWritten, look)
    )


def test_a_fetched_shard_that_was_damaged_is_fetched_again(
    hub: Hub, forty: Path, expected: Any, tmp_path: Path
) -> None:
    commit, out = hub.add(NAME, forty), tmp_path / "out"

    def stop(event: Event) -> None:
        raise Stop

    def run(on_event: Any = None) -> None:
        fourfold.quantize(NAME, out, W4A16, runtime=STREAMED, on_event=on_event)

    with pytest.raises(Stop):
        run(only(ShardWritten, stop))
    shards = sorted((out / ".fourfold" / "source" / commit).glob("*.safetensors"))
    assert shards
    for shard in shards:
        shard.write_bytes(bytes(shard.stat().st_size))
    for _ in shards:  # one that somebody waits for ends the run, which can be begun again
        with suppress(SourceError):
            run()
            break
    else:
        run()
    assert tensors_of(out) == tensors_of(expected(W4A16)[1])


def test_a_run_without_verification_can_be_verified_when_it_resumes(
    hub: Hub, forty: Path, tmp_path: Path
) -> None:
    """Tensors that were written without being compared are compared with the source again."""
    hub.add(NAME, forty)

    def stop(event: ShardWritten) -> None:
        if event.shards_done == 2:
            raise Stop

    with pytest.raises(Stop):
        fourfold.quantize(
            NAME,
            tmp_path / "out",
            W4A16,
            runtime=STREAMED,
            output=OutputConfig(verify=False),
            on_event=only(ShardWritten, stop),
        )
    result = fourfold.quantize(NAME, tmp_path / "out", W4A16, runtime=STREAMED)
    assert result.report is not None
    assert result.report.clean
    assert result.report.counts.compared_linears == len(result.plan.linears)
    assert not (tmp_path / "out" / ".fourfold").exists()


def test_errors_are_fourfolds_own(hub: Hub, forty: Path, tmp_path: Path) -> None:
    """A model that becomes gated while it is read."""
    hub.add(NAME, forty)

    def close(event: Event) -> None:
        hub.models[NAME].is_gated = True

    with pytest.raises(FourfoldError, match="has to grant access"):
        fourfold.quantize(
            NAME, tmp_path / "out", W4A16, runtime=STREAMED, on_event=only(ShardWritten, close)
        )
    shutil.rmtree(tmp_path / "out")


def test_a_signal_while_a_transfer_hangs(
    hub: Hub, forty: Path, expected: Any, tmp_path: Path
) -> None:
    hub.add(NAME, forty)
    hub.stalls = {sorted(sizes_of(forty))[20]}
    words = ["quantize", NAME, tmp_path / "out", "--threads", 2, "--no-keep-source"]
    with start_command(*words, before=asking(hub, tmp_path / "home")) as process:
        while process.poll() is None and len(finished_in(tmp_path / "out")) < 4:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        stderr = process.communicate()[1]
    assert process.returncode == 143, stderr
    assert "the same command resumes" in stderr
    hub.stalls.clear()
    fourfold.quantize(NAME, tmp_path / "out", runtime=STREAMED)
    assert tensors_of(tmp_path / "out") == tensors_of(expected(W4A16)[1])


# ------------------------------------------------------------------------------------ ranks


def on_two_ranks(words: list[Any], before: str, *, share: bool = True) -> None:
    """Run `fourfold …` on two ranks; `{rank}` in `words` is the number of each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    ranks = []
    for rank in range(2):
        environment = {
            "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "LOCAL_RANK": str(rank if share else 0), "LOCAL_WORLD_SIZE": "2" if share else "1",
        }  # fmt: skip
        own = [str(word).replace("{rank}", str(rank)) for word in words]
        ranks.append(start_command(*own, before=before, environment=environment))
    for process in ranks:
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr


@pytest.mark.parametrize("recipe", [W4A16, pytest.param(W4A4, marks=pytest.mark.slow)])
def test_ranks_share_what_they_fetch(
    recipe: str, hub: Hub, forty: Path, expected: Any, tmp_path: Path
) -> None:
    hub.add(NAME, forty)
    options, out, _ = expected(recipe)
    words = ["quantize", NAME, tmp_path / "out", "-r", recipe, "--threads", 1, "--shards", 1]
    words += ["--no-keep-source"]
    if recipe == W4A4:
        calib = options["calibration"]
        words += ["--calib", calib.calib[0], "--calib-seq", 16, "--calib-size", 4]
    on_two_ranks(words, asking(hub, tmp_path / "home"))
    written = tensors_of(tmp_path / "out")
    if recipe == W4A4:  # sums over batches are rounded otherwise
        assert written.keys() == tensors_of(out).keys()
    else:
        assert written == tensors_of(out)
    assert not (tmp_path / "out" / ".fourfold").exists()


def test_nodes_fetch_for_themselves(hub: Hub, forty: Path, expected: Any, tmp_path: Path) -> None:
    hub.add(NAME, forty)
    words = ["quantize", NAME, tmp_path / "node{rank}", "--threads", 1, "--shards", 1]
    words += ["--no-keep-source"]
    on_two_ranks(words, asking(hub, tmp_path / "home"), share=False)
    assert not shards_in(tmp_path / "node0") | shards_in(tmp_path / "node1")
    fourfold.merge([tmp_path / "node0", tmp_path / "node1"], tmp_path / "out")
    assert tensors_of(tmp_path / "out") == tensors_of(expected(W4A16)[1])

# SPDX-License-Identifier: Apache-2.0
"""Several ranks write what one writes; an error of one is an error of all.

What torchrun does is tried with torchrun itself. Else ranks are forked, with the variables that a
launcher gives them: that takes a fraction of the time.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

import fourfold
from families import Truth
from fourfold.config import CalibrationConfig, OutputConfig, Runtime
from fourfold.distributed.launcher import Launch, launch
from fourfold.distributed.machine import choose_device
from fourfold.distributed.ranks import RankFailedError, RankGroup, RankTimeouts
from fourfold.errors import FourfoldError
from fourfold.events import ShardWritten
from fourfold.planning import deal
from fourfold.planning.shards import effort
from fourfold.run.resume import _check_same, without_times
from jobs import W4A4, W4A16, assert_same, files_of, flat, ids_file, only, start_command

Written = Callable[[str], tuple[Path, Truth]]
MODEL = "qwen3_5_moe_vl"
LOADER = "from fourfold.cli.app import main\n"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def on_ranks(
    arguments: Sequence[object], *, ranks: int = 2, before: str = "", shared: bool = True
) -> list[tuple[int, str, str]]:
    """Run `fourfold …` on that many ranks: the exit code of each, its stdout and its stderr.

    before: Python code that each rank runs first. shared: whether the ranks are on one machine; if
    not, `{rank}` in the arguments is the number of each.
    """
    port, processes = str(free_port()), []
    for rank in range(ranks):
        environment = {
            "RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "LOCAL_RANK": str(rank if shared else 0),
            "LOCAL_WORLD_SIZE": str(ranks if shared else 1), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        words = [str(argument).replace("{rank}", str(rank)) for argument in arguments]
        processes.append(start_command(*words, before=before, environment=environment))
    printed = [process.communicate() for process in processes]
    return [
        (int(process.returncode), *texts) for process, texts in zip(processes, printed, strict=True)
    ]


def torchrun(
    arguments: Sequence[object], *, ranks: int = 2, before: str = ""
) -> subprocess.Popen[str]:
    """`torchrun -m fourfold …`, where `before` is Python that each rank runs first."""
    program = ["-m", "fourfold"]
    if before:
        script = Path(os.environ["PYTEST_FOLDER"]) / "rank.py"
        script.write_text(f"{before}\n{LOADER}main()\n")
        program = [str(script)]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            *program,
            *map(str, arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_FOLDER", str(tmp_path))


SEQUENTIAL = "nvfp4_default_best"


def options_of(recipe: str, folder: Path, samples: int = 9) -> tuple[list[object], dict[str, Any]]:
    """The same options for the command line and for Python; two samples make a batch."""
    name: str | Path = recipe
    if recipe == JOINT:
        name = folder / "joint.yaml"
        name.write_text(JOINT)
    line: list[object] = ["-r", name, "--threads", 1]
    given: dict[str, Any] = {"recipe": name, "threads": 1}
    if recipe != W4A16:
        ids = ids_file(folder)
        line += ["--calib", ids, "--calib-seq", 24, "--calib-size", samples, "--batch-size", 2]
        given |= {"calib": [ids], "calib_seq": 24, "calib_size": samples, "batch_size": 2}
    return line, given


JOINT = """
weights: {scale: gptq_joint, descent: 1}
quantize_if_present: [experts, shared_experts, mlp, attention]
"""

RUNS = [
    (JOINT, 2),  # its statistics are sums, of other batches on each rank
    (W4A4, 3),  # two batches: one rank has none
    (SEQUENTIAL, 2),
    pytest.param(W4A16, 2, marks=pytest.mark.slow),
    pytest.param(SEQUENTIAL, 4, marks=pytest.mark.slow),
    pytest.param(W4A4, 2, marks=pytest.mark.slow),
    pytest.param(W4A16, 3, marks=pytest.mark.slow),
    pytest.param(W4A16, 4, marks=pytest.mark.slow),
    pytest.param(W4A4, 4, marks=pytest.mark.slow),
    pytest.param(W4A4, 7, marks=pytest.mark.slow),  # five batches: two ranks have none
]


@pytest.mark.parametrize(("recipe", "ranks"), RUNS)
def test_the_bytes_of_one_rank(recipe: str, ranks: int, written: Written, tmp_path: Path) -> None:
    """Cut into as many shards as there are ranks; `merge` gives the layout of one."""
    model = written(MODEL)[0]
    line, given = options_of(recipe, tmp_path, samples=3 if ranks == 3 else 9)
    processes = on_ranks(["quantize", model, tmp_path / "out", *line], ranks=ranks)
    assert all(code == 0 for code, *_ in processes), processes
    assert sum(out.count("verified") for _, out, _ in processes) == 1  # one rank speaks
    assert fourfold.quantize(model, tmp_path / "cut", **flat(shards=ranks, **given)).clean
    assert_same(tmp_path / "out", tmp_path / "cut")
    assert fourfold.quantize(model, tmp_path / "one", **flat(**given)).clean
    fourfold.merge([tmp_path / "out"], tmp_path / "merged")
    assert_same(tmp_path / "merged", tmp_path / "one")


def test_sequential_calibration_needs_a_batch_for_each_rank(
    written: Written, tmp_path: Path
) -> None:
    line, _ = options_of(SEQUENTIAL, tmp_path, samples=3)
    arguments = ["quantize", written(MODEL)[0], tmp_path / "out", *line]
    processes = on_ranks(arguments, ranks=3)
    assert [code for code, *_ in processes] == [2, 2, 2]
    assert "2 batches of calibration data for 3 ranks" in " ".join(processes[0][2].split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_shard_more_where_it_is_wished(written: Written, tmp_path: Path) -> None:
    model = written(MODEL)[0]
    arguments = ["quantize", model, tmp_path / "out", "-r", W4A16, "--shards", 1]
    code, _, err = ended(torchrun(arguments))
    assert code == 0, err
    fourfold.quantize(model, tmp_path / "one", W4A16)
    assert_same(tmp_path / "out", tmp_path / "one")


@pytest.mark.slow
def test_more_ranks_than_there_is_to_do(written: Written, tmp_path: Path) -> None:
    """A rank without a batch, without a shard, or without either is nothing special."""
    model, ids = written("qwen3_moe")[0], ids_file(tmp_path)
    arguments = [
        "quantize", model, tmp_path / "out", "-r", "nvfp4_experts_only", "--shards", 1,
        "--calib", ids, "--calib-seq", 24, "--calib-size", 2, "--batch-size", 1, "--threads", 1,
    ]  # fmt: skip
    code, _, err = ended(torchrun(arguments, ranks=4))
    assert code == 0, err
    fourfold.quantize(
        model,
        tmp_path / "one",
        "nvfp4_experts_only",
        calibration=CalibrationConfig(calib=[ids], calib_seq=24, calib_size=2, batch_size=1),
        runtime=Runtime(threads=1),
    )
    assert_same(tmp_path / "out", tmp_path / "one")


@pytest.mark.parametrize("recipe", [pytest.param(W4A16, marks=pytest.mark.slow), W4A4])
def test_nodes_that_share_no_folder(recipe: str, written: Written, tmp_path: Path) -> None:
    """Each writes into a folder of its own, which is no checkpoint; `merge` joins them."""
    model = written(MODEL)[0]
    line, given = options_of(recipe, tmp_path)
    nodes = on_ranks(["quantize", model, tmp_path / "node{rank}", *line], shared=False)
    for node, (code, out, err) in enumerate(nodes):
        assert code == 0, err
        assert ("join them with `fourfold merge`" in " ".join(out.split())) == (node == 0)
        assert not list((tmp_path / f"node{node}").glob("*.json"))
    fourfold.merge([tmp_path / "node1", tmp_path / "node0"], tmp_path / "merged")
    fourfold.quantize(model, tmp_path / "one", **flat(**given))
    assert_same(tmp_path / "merged", tmp_path / "one")
    for missing, words in ((0, "its run is not finished, or"), (1, "lies in none of these")):
        with pytest.raises(fourfold.SourceError, match=words):
            fourfold.merge([tmp_path / f"node{1 - missing}"], tmp_path / "gap")
        assert not (tmp_path / "gap").exists()


SLOW_READS = """
import os, time
from fourfold.sources.safetensors import SafetensorsFolder
slab = SafetensorsFolder.slab
def slow(*a, **k):
    time.sleep(0.3)
    return slab(*a, **k)
SafetensorsFolder.slab = slow
"""

FAILURES = {
    "an error": (
        """
from fourfold.errors import SourceError
def broken(*_):
    time.sleep(1)
    raise SourceError("the cat sat on it.")
if os.environ["RANK"] == "1":
    SafetensorsFolder.slab = broken
""",
        "rank 1: the cat sat on it.",
    ),
    "a kill": (
        """
import threading
def die():
    time.sleep(2)
    os.kill(os.getpid(), 9)
if os.environ["RANK"] == "1":
    threading.Thread(target=die, daemon=True).start()
""",
        "",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_rank_that_fails_ends_all(failure: str, written: Written, tmp_path: Path) -> None:
    """Before the job is done; what it leaves does not load, and the same command resumes it."""
    model, out = written(MODEL)[0], tmp_path / "out"
    before, words = FAILURES[failure]
    arguments = ["quantize", model, out, "-r", W4A16]
    if failure == "a kill":  # torchrun ends the other rank
        code, _, err = ended(torchrun(arguments, before=SLOW_READS + before))
        assert code != 0
    else:
        processes = on_ranks(arguments, before=SLOW_READS + before)
        assert all(code != 0 for code, *_ in processes)
        err = "".join(text for _, _, text in processes)
    assert words in err
    assert "Traceback" not in re.sub(r"(?s)E\d{4}.*|torch\.distributed.*", "", err)
    assert not list(out.glob("*.json"))
    has_finished = bool(list(out.glob("*.safetensors")))
    fourfold.quantize(model, out, W4A16)
    fourfold.quantize(
        model, tmp_path / "other", W4A16, output=OutputConfig(shards=2 if has_finished else 1)
    )
    assert_same(out, tmp_path / "other")


NAN = """
import os
import torch
from fourfold.sources.safetensors import SafetensorsFolder
slab = SafetensorsFolder.slab
def spoilt(self, key, *a, **k):
    found = slab(self, key, *a, **k)
    return found.fill_(torch.nan) if "layers.2.mlp.experts" in key else found
if os.environ["RANK"] == "1":
    SafetensorsFolder.slab = spoilt
"""


@pytest.mark.slow
def test_ranks_that_go_on_with_another_job(written: Written, tmp_path: Path) -> None:
    """It is refused, and what is there stays as it is."""
    model, out = written(MODEL)[0], tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fourfold.quantize(
            model, out, W4A16, on_event=only(ShardWritten, stop), output=OutputConfig(shards=2)
        )
    before = {name: data for name, data in files_of(out).items() if "rank-" not in name}
    assert before
    code, _, err = ended(torchrun(["quantize", model, out, "-r", "w4a16_nvfp4_experts_only"]))
    assert code != 0
    assert "holds an unfinished run of something else. Changed since: recipe.name" in err
    now = {name: data for name, data in files_of(out).items() if "rank-" not in name}
    assert now == before


def stop(_: Any) -> None:
    raise KeyboardInterrupt


def test_what_is_hopeless_leaves_nothing(written: Written, tmp_path: Path) -> None:
    """The next run would meet it again, so there is nothing to go on from."""
    model, out = written(MODEL)[0], tmp_path / "out"
    for code, _, err in on_ranks(["quantize", model, out, "-r", W4A16], before=NAN):
        assert code != 0
        assert "experts.down_proj in model.safetensors): nan at [0, 0]" in err
        assert "the same command resumes" not in err
    assert not out.exists()


@contextmanager
def threads_of(size: int, timeouts: RankTimeouts | None = None) -> Iterator[list[RankGroup]]:
    """Ranks that are threads of this process."""
    server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    stores = [TCPStore("127.0.0.1", server.port, None, False) for _ in range(size)]
    yield [RankGroup(store, rank, size, timeouts=timeouts) for rank, store in enumerate(stores)]


def together(ranks: Sequence[RankGroup], what: Callable[[RankGroup], Any]) -> list[Any]:
    """What each rank's part in a job gives: a value, or its error."""
    found: dict[int, Any] = {}

    def run(rank: RankGroup) -> None:
        try:
            with rank.joined():
                found[rank.rank] = what(rank)
        except FourfoldError as error:
            found[rank.rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return [found[rank.rank] for rank in ranks]


def test_ranks_gather() -> None:
    with threads_of(4) as ranks:
        rounds = together(
            ranks, lambda rank: [rank.gather([rank.rank, turn]) for turn in range(50)]
        )
    expected = [[[rank, turn] for rank in range(4)] for turn in range(50)]
    assert rounds == [expected] * 4


def test_an_error_reaches_those_who_wait_and_those_who_work() -> None:
    def act(rank: RankGroup) -> None:
        if rank.rank == 2:
            raise fourfold.UsageError("no such thing.")
        if rank.rank == 1:
            rank.gather("waits")
        while True:
            rank.check()
            time.sleep(0.01)

    with threads_of(4) as ranks:
        found = together(ranks, act)
    assert [str(error) for error in found] == [
        "rank 2: no such thing.", "rank 2: no such thing.", "no such thing.",
        "rank 2: no such thing.",
    ]  # fmt: skip
    assert {error.exit_code for error in found} == {2}


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_falls_silent(silent: int) -> None:
    with threads_of(3, RankTimeouts(silence=1.5)) as ranks:
        mute = ranks[silent]
        alive = [rank for rank in ranks if rank is not mute]
        mute._store.set(f"pulse/{silent}", "0")

        def wait(rank: RankGroup) -> None:
            rank.gather("here")

        found = together(alive, wait)
    assert all(isinstance(error, RankFailedError) for error in found)
    assert all(f"rank {silent}: no sign of life" in str(error) for error in found)


@pytest.mark.parametrize("is_alive", [True, False])
def test_who_failed_waits_for_those_who_live(is_alive: bool) -> None:
    """For as long as they give signs of life, and not long for one that gives none."""
    events: list[str] = []

    def act(rank: RankGroup) -> None:
        if rank.rank == 1:  # in the middle of a large shard
            time.sleep(2)
            events.append("done")
            rank.stop_writing()
            rank.check()
        try:
            raise fourfold.UsageError("no such thing.")
        except fourfold.UsageError:
            rank.stop_writing()
            events.append("settled")
            raise

    with threads_of(2, RankTimeouts(pulse=0.05, farewell=1.0)) as ranks:
        found = together(ranks if is_alive else ranks[:1], act)
    texts = ["no such thing.", "rank 0: no such thing."]
    assert [str(error) for error in found] == texts[: len(found)]
    assert events == (["done", "settled"] if is_alive else ["settled"])


@pytest.mark.slow
def test_a_rank_that_is_slow_to_hear_of_the_end(written: Written, tmp_path: Path) -> None:
    """The first may have made OUT a checkpoint, and taken the run's state away, by then."""
    model, out = written("qwen3_moe")[0], tmp_path / "out"
    before = """
import os, time
from fourfold.run.job import Job
finish = Job._finish
def slow(self):
    if os.environ["RANK"] == "1":
        while os.path.exists(self.folder.state.folder):
            time.sleep(0.05)
    return finish(self)
Job._finish = slow
"""
    code, _, err = ended(torchrun(["quantize", model, out, "-r", W4A16], before=before))
    assert code == 0, err
    assert fourfold.verify(out, source=model).clean


def test_ranks_that_are_given_other_things() -> None:
    """Another recipe or source is an error of all; other times of a copied source are none."""

    def identity(rank: int, recipe: str = "a", mtime: int = 0) -> dict[str, Any]:
        files = {"model.safetensors": [10, mtime + rank, "digest"]}
        return without_times({"recipe": recipe, "source": {"name": "model", "files": files}})

    with threads_of(2) as ranks:
        found = together(ranks, lambda rank: _check_same(rank, identity(rank.rank)))
    assert found == [None, None]
    with threads_of(2) as ranks:
        recipes = ("a", "b")
        found = together(
            ranks, lambda rank: _check_same(rank, identity(rank.rank, recipes[rank.rank]))
        )
    assert all("rank 1 has another recipe than rank 0" in str(error) for error in found)


def test_each_rank_has_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, value in (
        ("RANK", "0"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "here"), ("MASTER_PORT", "1"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    for local, device in (("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", local)
        assert choose_device("auto") == choose_device("cuda") == device
        assert choose_device("cuda:1") == "cuda:1"
        assert choose_device("cpu") == "cpu"
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    assert choose_device("auto") == choose_device("cuda") == "cuda:1"


def test_an_environment_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK alone is nobody's launch; numbers that cannot be are an error at once."""
    monkeypatch.setenv("RANK", "1")
    assert launch() == Launch()
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "here"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert launch() == Launch(1, 2)
    for name, value in (("RANK", "2"), ("RANK", "-1"), ("RANK", "x"), ("LOCAL_WORLD_SIZE", "0")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(fourfold.UsageError, match="Start all"):
                launch()


def test_what_is_not_shared_out_is_done_once(written: Written, tmp_path: Path) -> None:
    first, second = on_ranks(["plan", written(MODEL)[0], "-r", W4A16, "--json"])
    assert json.loads(first[1])["linear_weights"]
    assert second == (0, "", "")


def test_shards_are_dealt_evenly(written: Written) -> None:
    plan = fourfold.plan(written(MODEL)[0], W4A16)
    every = range(len(plan.shards))
    efforts = [effort(shard.tensors) for shard in plan.shards]
    for ranks in (1, 2, 3, 5, 50):
        dealt = deal(plan.shards, every, ranks)
        assert sorted(number for numbers in dealt for number in numbers) == list(every)
        loads = [sum(efforts[number] for number in numbers) for numbers in dealt]
        assert max(loads) - min(loads) <= max(efforts)


def test_a_signal_to_one_of_the_ranks(written: Written, tmp_path: Path) -> None:
    """Slurm and others send SIGTERM to torchrun: all ranks end, and say how to go on."""
    model, out = written(MODEL)[0], tmp_path / "out"
    process = torchrun(["quantize", model, out, "-r", W4A16], before=SLOW_READS)
    while not list(out.glob("model-*.safetensors")):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code != 0
    assert "error: stopped by SIGTERM" in err
    assert "the same command resumes" in err
    assert not list(out.glob("*.json"))
    before = files_of(out).keys()
    assert not [name for name in before if name.endswith(".partial")]

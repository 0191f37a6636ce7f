# SPDX-License-Identifier: Apache-2.0
"""One case: a seed's checkpoint, its mutations, the commands, and the promise.

Commands run in this process, as `fourfold.cli.terminal.run` has the console script run them.
They end

    with exit code 0: what was written verified against its source, and holds what it lists;
    or with 1 or 2, a message of at most two lines that is no defect's, and no checkpoint in OUT;
    and whatever they read, and whatever lies beside OUT, is as it was.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from unittest import mock

import fourfold
from fourfold.cli import terminal
from fourfold.cli.app import app
from fourfold.distributed.machine import peak_resident
from fuzz.bases import CALIB_OPTIONS, FAMILY_SHARDS, W4A4, W4A16, Bases
from fuzz.mutations import add_stray, mutate_file

SECONDS = 30
"""A case takes a tenth of one; a hang is longer."""

MEMORY = 1 << 30
"""Bytes that no case of these sizes needs."""

ADDRESSES = 16 << 30
"""Bytes of address space: more than this fails at once, before it takes the machine's memory."""

KEPT = "the same command resumes"
"""What a run says that has stopped in the middle: OUT is no checkpoint, but not empty."""

OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in CALIB_OPTIONS.items()]
TARGETS = ("source",) * 11 + ("out",) * 4 + ("calib",) * 2 + ("recipe",) * 2 + ("statistics",)


class Broken(AssertionError):
    """The promise does not hold."""


class HangError(BaseException):
    """A case takes too long. Not an `Exception`, which the code under test may keep."""


def run_case(seed: int, folder: Path, bases: Bases) -> str:
    """Run the case of a seed in an empty folder, and say what it was.

    Raises `Broken` where the promise does not hold.
    """
    case = Case(seed, folder, bases)
    offline = mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # for made-up names
    with contextlib.chdir(folder), offline:
        case.prepare()
        before = snapshot(folder, without=case.written)
        try:
            with limits():
                said = case.run()
            if changed := before.items() ^ snapshot(folder, without=case.written).items():
                raise Broken(f"changed: {sorted(changed)[:3]}")
        except (Exception, HangError) as error:
            text = str(error) or type(error).__name__
            again = f"PYTHONPATH=tests python -m fuzz {seed}"
            raise Broken(f"seed {seed} ({case}): {case.how}\n  {text}\n  {again}") from error
    return f"seed {seed} ({case}): {case.how}: {said}"


class Case:
    """What a seed does in its folder."""

    def __init__(self, seed: int, folder: Path, bases: Bases) -> None:
        self.folder, self.bases, self.rng = folder, bases, Random(seed)
        self.source, self.out = folder / "source", folder / "out"
        self.target = self.rng.choice(TARGETS)
        self.family = self.rng.choice(sorted(FAMILY_SHARDS))
        self.recipe = self.rng.choice((W4A16, W4A16, W4A4))
        if self.target in ("calib", "statistics"):
            self.recipe = W4A4
        elif self.target == "recipe":
            self.recipe = self.rng.choice(fourfold.recipes.builtin_names())
        self.overwrites = self.target == "out" and self.rng.random() < 0.3
        self.options = ["--threads=1", *["--json"] * self.rng.randrange(2)]
        self.how = ""

    def __str__(self) -> str:
        return f"{self.target}, {self.family}, {self.recipe}"

    @property
    def written(self) -> Path | None:
        """The folder that may change."""
        return None if self.target == "out" and not self.overwrites else self.out

    def prepare(self) -> None:
        """Copy what the commands read, and break it."""
        (self.folder / "victim").write_text("stays")
        if self.target == "out":
            shutil.copytree(self.bases.out(self.family, self.recipe), self.out)
        else:
            self._copy_inputs()
        self.how = "; ".join(self._mutate() for _ in range(self.rng.choice((1, 1, 1, 2, 3))))

    def _copy_inputs(self) -> None:
        shutil.copytree(self.bases.source(self.family), self.source)
        chosen, calib = fourfold.Recipe.load(self.recipe), self.rng.choice(self.bases.calib)
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(chosen.to_yaml())
        self.options += [f"--recipe={recipe}"]
        if chosen.needs_calibration and self.target == "statistics":
            found = self.bases.out(self.family, W4A4) / "calibration.safetensors"
            self.options += [f"--calibration={shutil.copy(found, self.folder)}"]
        elif chosen.needs_calibration:
            self.options += [f"--calib={shutil.copy(calib, self.folder)}", *OPTIONS]

    def _mutate(self) -> str:
        if self.target in ("source", "out"):
            folder = self.source if self.target == "source" else self.out
            if self.rng.random() < 0.06:
                return add_stray(folder, self.rng)
            files = [file for file in sorted(folder.iterdir()) if file.suffix != ".html"]
            main = [file for file in files if file.name.startswith(("model", "config"))]
            return mutate_file(self.rng.choice([*main, *main, *files]), self.rng)
        suffixes = {"recipe": ".yaml", "statistics": ".safetensors", "calib": (".jsonl", ".txt")}
        files = [x for x in sorted(self.folder.iterdir()) if x.name.endswith(suffixes[self.target])]
        return mutate_file(files[0], self.rng) if files else "nothing left to change"

    def run(self) -> str:
        """Run the commands, and judge how they ended."""
        if self.target != "out":
            result = command("quantize", self.source, self.out, *self.options)
            self._judge(result)
            return str(result)
        if self.overwrites:
            return self._overwrite()
        more = ["--source", self.bases.source(self.family)] * self.rng.randrange(2)
        as_json = self.options[1:]
        results = [
            command("verify", self.out, *more, *self.options),
            command("inspect", self.out, *as_json),
            command("summary", self.out, *as_json),
            outcome("load", lambda: fourfold.load(self.out) and None),
        ]
        return "; ".join(map(str, results))

    def _overwrite(self) -> str:
        """Write anew where something is broken: it stays as it is, or is no checkpoint."""
        before, config = snapshot(self.out), self.out / "config.json"
        options = (f"--recipe={W4A16}", "--overwrite", *self.options)
        result = command("quantize", self.bases.source(self.family), self.out, *options)
        if result.message and config.exists() and snapshot(self.out) != before:
            raise Broken(f"{result}, but OUT is another one")
        return str(result)

    def _judge(self, result: Outcome) -> None:
        if result.code and result.message:
            held = snapshot(self.out) or self.out.exists()
            if held and (KEPT not in result.message or (self.out / "config.json").exists()):
                raise Broken(f"{result}, but OUT holds {sorted(snapshot(self.out))}")
        elif result.code:
            raise Broken(f"{result}: what was written does not verify")
        else:
            listed = json.loads((self.out / "quant_summary.json").read_bytes())["files"]
            held = [path for path in self.out.rglob("*") if not path.is_dir()]
            if sorted(listed) != sorted(str(path.relative_to(self.out)) for path in held):
                raise Broken(f"OUT lists {sorted(listed)} and holds {sorted(held)}")
            if odd := [x for x in held if x.is_symlink() or x.read_bytes() == b"stays"]:
                raise Broken(f"OUT holds what lies outside of the source: {odd}")


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """A limit on time, one on addresses, and one on memory."""
    peak, before = peak_resident(), resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # where no signal gets through
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    if (grown := peak_resident() - peak) > MEMORY:
        raise Broken(f"{grown:,} bytes of memory were taken")


def _out_of_time(*_: object) -> None:
    raise HangError(f"more than {SECONDS} s")


def snapshot(folder: Path, without: Path | None = None) -> dict[str, tuple[int, ...]]:
    """Everything in a folder, by its path: kind, size, time of the last change, and its file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if without is None or (path != without and without not in path.parents):
            status = path.lstat()
            size = 0 if path.is_dir() else status.st_size
            found[str(path)] = (status.st_mode, size, status.st_mtime_ns, status.st_ino)
    return found


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it said on stderr."""

    name: str
    code: int
    stdout: str
    message: str

    def __str__(self) -> str:
        return f"{self.name} → {self.code} {self.message}"


def command(*arguments: object) -> Outcome:
    """Run a command of the command line; with --json, its output is one document."""
    words = [str(argument) for argument in arguments]
    result = outcome(words[0], lambda: app(words, standalone_mode=False))
    if "--json" in words and not result.message:
        json.loads(result.stdout)
    return result


def outcome(name: str, call: Callable[[], object]) -> Outcome:
    """Run something as the console script does; `Broken` where it does not end as promised."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    arguments, sys.argv = sys.argv, ["fourfold", "--debug"]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error")  # it would stand on stderr
            terminal.run(lambda **_: call())
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv = arguments
        for each, handler in handlers.items():
            signal.signal(each, handler)
    traceback, is_error, message = err.getvalue().rpartition("\nerror: ")
    if not is_error:
        lines = message.splitlines()
        message = "\n".join(line for line in lines if not line.startswith("warning: "))
    fits = code in (1, 2) if is_error else code in (0, 1) and not message
    if not fits or "a defect of fourfold" in message or message.strip().count("\n") > 1:
        raise Broken(f"{name} ended with {code}: {message}\n{traceback}")
    return Outcome(name, code, out.getvalue(), message.strip())

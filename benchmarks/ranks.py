# SPDX-License-Identifier: Apache-2.0
"""Two ranks against one, and what they take of memory.

    python benchmarks/ranks.py [--layers 6] [--folder DIR] [--runs 3] [--recipe …] [--json FILE]

Writes the checkpoint of `synthetic.py` (several GB), then runs whole commands in turn and takes
medians:

    one    fourfold quantize … --threads 1, held to a single core
    two    torchrun --nproc-per-node 2 -m fourfold quantize … --threads 1
    all    fourfold quantize …, with as many threads as there are cores

`job` is what the command says of itself: from its plan to the end of the verification. `command`
is the wall clock of everything, with the start of Python, PyTorch and the launcher. Memory is the
sum, over all processes that quantize, of each one's peak resident memory (Linux's high-water
mark), torchrun's own process left out. The tensors of `one` and `two` are compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
from synthetic import make

RECIPE = "w4a16_nvfp4_experts_only_mse"


def run(command: list[str], *, cores: set[int] | None = None) -> tuple[float, float, int]:
    """Seconds of the job and of the command, and bytes of peak resident memory of all ranks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    peaks: dict[int, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            for rank in _ranks(process.pid, "torch.distributed.run" in command):
                peaks[rank] = max(peaks.get(rank, 0), _peak(rank))

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = process.communicate()
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return json.loads(out)["seconds"], seconds, sum(peaks.values())


def _ranks(pid: int, is_launched: bool) -> list[int]:
    try:
        return [x.pid for x in psutil.Process(pid).children()] if is_launched else [pid]
    except psutil.NoSuchProcess:
        return []


def _peak(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, however they are cut."""
    import numpy as np

    from fourfold.storage.safetensors_header import TensorInfo, read_header

    def infos(folder: Path) -> dict[str, TensorInfo]:
        return {
            key: info
            for file in folder.glob("model-*.safetensors")
            for key, info in read_header(file).items()
        }

    mine, theirs = infos(one), infos(other)
    if mine.keys() != theirs.keys():
        return False
    for key, info in mine.items():
        pair = []
        for each in (info, theirs[key]):
            pair.append(np.memmap(each.file, mode="r")[each.start : each.stop])
        if not np.array_equal(*pair):
            return False
    return True


def measure(folder: Path, layers: int, runs: int, recipe: str) -> dict[str, object]:
    model = folder / "model"
    if not model.exists():
        make(model, layers)
    python = [sys.executable, "-m"]
    job = ["fourfold", "quantize", str(model)]
    options = ["-r", recipe, "--json"]
    if "w4a16" not in recipe:
        rows = [[(7 * row + 13 * place) % 32000 for place in range(257)] for row in range(32)]
        ids = folder / "ids.jsonl"
        ids.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        options += ["--calib", str(ids), "--calib-seq", "256", "--calib-size", "16"]
        options += ["--batch-size", "1"]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    commands = {
        "one": [*python, *job, str(folder / "one"), *options, "--threads", "1"],
        "two": [*python, *launch, *job, str(folder / "two"), *options, "--threads", "1"],
        "all": [*python, *job, str(folder / "all"), *options],
    }
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in commands}
    one_core = {min(os.sched_getaffinity(0))}
    for _ in range(runs):
        for name, command in commands.items():
            shutil.rmtree(folder / name, ignore_errors=True)  # so that the input stays cached
            os.sync()
            found[name].append(run(command, cores=one_core if name == "one" else None))
    medians = {
        name: tuple(statistics.median(each) for each in zip(*results, strict=True))
        for name, results in found.items()
    }
    return {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "recipe": recipe,
        "input_gb": sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e9,
        "runs": runs,
        "job_seconds": {name: round(each[0], 1) for name, each in medians.items()},
        "command_seconds": {name: round(each[1], 1) for name, each in medians.items()},
        "memory_gb": {name: round(each[2] / 1e9, 2) for name, each in medians.items()},
        "job_ratio": round(medians["two"][0] / medians["one"][0], 3),
        "command_ratio": round(medians["two"][1] / medians["one"][1], 3),
        "memory_ratio": round(medians["two"][2] / medians["one"][2], 3),
        "same_tensors": same_tensors(folder / "one", folder / "two"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("bench-ranks"))
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    figures = measure(arguments.folder, arguments.layers, arguments.runs, arguments.recipe)
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    if not arguments.keep:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()

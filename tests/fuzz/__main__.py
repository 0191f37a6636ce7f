# SPDX-License-Identifier: Apache-2.0
"""One case again, with its traceback; or a range of cases, with what fails."""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from fuzz import Broken, make_bases, run_case


def main(first: int, end: int | None = None) -> None:
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (root / "bases").mkdir()
    bases = make_bases(root / "bases")
    begun, failed = time.perf_counter(), 0
    seeds = range(first, end or first + 1)
    for seed in seeds:
        (folder := root / str(seed)).mkdir()
        try:
            said = run_case(seed, folder, bases)
        except Broken as error:
            failed, said = failed + 1, str(error)
            print(said, flush=True)
        if end is not None:
            shutil.rmtree(folder)
    if end is None:
        print(said, f"its files: {folder}", sep="\n")
        return
    shutil.rmtree(root)
    print(f"{len(seeds):,} cases, {failed} failed, {time.perf_counter() - begun:.0f} s")


main(*[int(word) for word in sys.argv[1:]])

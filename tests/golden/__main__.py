# SPDX-License-Identifier: Apache-2.0
"""Take the digests: `PYTHONPATH=tests .venv/bin/python -m golden`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from .cases import JOBS, LAYOUTS, digests_of, probe
from .test_golden import FILE


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        outputs = {}
        for name, (run, family, recipe) in JOBS.items():
            folder = Path(work) / name
            folder.mkdir()
            run(family, recipe, folder)
            outputs[name] = digests_of(folder / "out")
            print(name, flush=True)
        probes = {family: probe(family, Path(work) / f"probe-{family}") for family in LAYOUTS}
    frozen = {"probes": probes, "outputs": outputs}
    FILE.write_text(json.dumps(frozen, indent=2) + "\n")


if __name__ == "__main__":
    main()

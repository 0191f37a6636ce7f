# SPDX-License-Identifier: Apache-2.0
"""No change of the code changes a byte of any output.

The digests in `digests.json` were taken when they were frozen. To take them again, after a change
of the output that is meant: `PYTHONPATH=tests .venv/bin/python -m golden`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from .cases import JOBS, digests_of, probe

FILE = Path(__file__).with_name("digests.json")
FROZEN = json.loads(FILE.read_text()) if FILE.exists() else {}


@pytest.fixture(scope="module")
def rounds_alike(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bool]:
    """Whether this machine computes a family's model as the one did that the digests are from."""

    @cache
    def is_alike(family: str) -> bool:
        folder = tmp_path_factory.mktemp("probe") / "model"
        return probe(family, folder) == FROZEN["probes"][family]

    return is_alike


@pytest.mark.parametrize("name", JOBS)
def test_output_is_unchanged(
    name: str, rounds_alike: Callable[[str], bool], tmp_path: Path
) -> None:
    run, family, recipe = JOBS[name]
    run(family, recipe, tmp_path)
    digests, frozen = digests_of(tmp_path / "out"), dict(FROZEN["outputs"][name])
    if not rounds_alike(family):
        del digests["calibrated"], frozen["calibrated"]
    assert digests == frozen


def test_every_job_is_frozen() -> None:
    assert FROZEN["outputs"].keys() == JOBS.keys()

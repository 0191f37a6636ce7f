# SPDX-License-Identifier: Apache-2.0
"""Every case of the fuzz keeps the promise; see the package for how to run one again."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz import Bases, Broken, make_bases, run_case

CASES = 50
SLOW_CASES = 10_000
AT_ONCE = 250


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("seed", range(CASES))
def test_a_case(seed: int, bases: Bases, tmp_path: Path) -> None:
    run_case(seed, tmp_path, bases)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(CASES, CASES + SLOW_CASES, AT_ONCE))
def test_many_cases(first: int, bases: Bases, tmp_path: Path) -> None:
    broken = []
    for seed in range(first, first + AT_ONCE):
        (folder := tmp_path / str(seed)).mkdir()
        try:
            run_case(seed, folder, bases)
        except Broken as error:
            broken.append(str(error))
    assert not broken, "\n".join(broken)

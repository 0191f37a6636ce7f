# SPDX-License-Identifier: Apache-2.0
"""Proves for every family: streaming computes the same bits, and observers see what hooks see.

Every family that transformers can build (most of them in the slow suite) runs as a whole
(`from_pretrained`), streamed, and streamed under observers; all hidden states and outputs are
compared bit by bit. Plain hooks count from the router's choice, token after token
(`running.Seen`). Counts and largest values are compared for equality: both sides take them from
the same rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from families import FAMILIES, mostly_slow

from .running import NO_CACHE, NO_KNOWN_EXPERTS, RUNNABLE, VARIED, Compared, compare, differences

NOT_RUNNABLE = {"longcat_flash_zero": "from_pretrained refuses it, so there is nothing to compare"}

OTHER_WITH_A_CACHE = {"inkling": "with transformers' cache its convolutions round otherwise"}
"""Families whose keys and values are not the same bits with a cache that stores and without."""


def test_which_families_are_not_run() -> None:
    assert set(FAMILIES) - set(RUNNABLE) == set(NOT_RUNNABLE)


@pytest.mark.parametrize("name", mostly_slow(RUNNABLE, *VARIED, *OTHER_WITH_A_CACHE))
def test_every_family(name: str, written: Any) -> None:
    run = compare(name, written(name)[0])
    check_bits(run)
    check_experts(name, run)
    check_linears(run)
    if name not in NO_CACHE:
        check_keys_and_values(name, run)


def check_bits(run: Compared) -> None:
    """Neither streaming nor observers change a bit; no mode of a waiting call is in force."""
    assert differences(run.bare.trace, run.whole) == []
    assert differences(run.observed.trace, run.whole) == []
    assert run.bare.steps == list(range(len(run.tree.layers)))
    assert run.bare.store.written > 0
    assert all(torch.isfinite(t).all() for out in run.whole.outputs.values() for t in out.values())
    assert run.bare.leaks == run.observed.leaks == []


def check_experts(name: str, run: Compared) -> None:
    found, seen = run.observed.statistics.experts, run.seen
    assert found.keys() == seen.tokens.keys()
    assert bool(found) is (FAMILIES[name].layout != "dense" and name not in NO_KNOWN_EXPERTS)
    for path, experts in found.items():
        assert experts.tokens.tolist() == seen.tokens[path].tolist(), path
        assert experts.gate_up_amax.tolist() == seen.gate_up[path].tolist(), path
        assert experts.down_amax.tolist() == seen.down[path].tolist(), path
        assert experts.unreached == [e for e, n in enumerate(seen.tokens[path].tolist()) if not n]


def check_linears(run: Compared) -> None:
    found = {path: (x.amax, x.rows) for path, x in run.observed.statistics.linears.items()}
    assert found == run.seen.linears
    assert found


def check_keys_and_values(name: str, run: Compared) -> None:
    """The observers' cache gets what transformers' own cache gets."""
    found = run.observed.statistics.kv
    assert found.keys() == run.seen.kv.keys() <= set(run.tree.layers)
    assert found
    assert (found == run.seen.kv) is (name not in OTHER_WITH_A_CACHE)

# SPDX-License-Identifier: Apache-2.0
"""Arguments are checked where they are given, and messages name them as the user spelled them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fourfold import CalibrationConfig, OutputConfig, Runtime, Statistics, UsageError
from fourfold.calibration.statistics import DataSummary
from fourfold.cli.options import as_options


def test_a_string_is_one_file() -> None:
    assert CalibrationConfig(calib="data.jsonl").files == ("data.jsonl",)
    assert CalibrationConfig(calib=Path("data.jsonl")).files == ("data.jsonl",)
    assert CalibrationConfig(calib=["a.txt", Path("b")]).files == ("a.txt", "b")
    assert CalibrationConfig().files == ()


STATISTICS = Statistics(DataSummary("text", "digest", 1, 2, 2))
CONFIG = CalibrationConfig(calib_size=7)


@pytest.mark.parametrize(
    ("short", "config"),
    [
        (None, CalibrationConfig()),
        (CONFIG, CONFIG),
        ("data.jsonl", CalibrationConfig(calib="data.jsonl")),
        (Path("data.txt"), CalibrationConfig(calib=Path("data.txt"))),
        (["a.txt", "b.txt"], CalibrationConfig(calib=["a.txt", "b.txt"])),
        ("out/x.safetensors", CalibrationConfig(statistics="out/x.safetensors")),
        (STATISTICS, CalibrationConfig(statistics=STATISTICS)),
    ],
)  # fmt: skip
def test_short_forms(short: Any, config: CalibrationConfig) -> None:
    assert CalibrationConfig.of(short) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CalibrationConfig(calib_size=0), "`calib_size=0`: give a whole number of at lea"),
        (lambda: CalibrationConfig(calib_seq=1), "`calib_seq=1`: give a whole number of at lea"),
        (lambda: CalibrationConfig(batch_size=1.5), "`batch_size=1.5`"),  # type: ignore[arg-type]
        (lambda: CalibrationConfig(seed="x"), "`seed=x`: give a whole number."),  # type: ignore[arg-type]
        (lambda: CalibrationConfig(activation_memory=-1), "`activation_memory=-1`"),
        (lambda: CalibrationConfig(packing="loose"), "`packing=loose`: give 'packed' or 'padded'"),
        (lambda: CalibrationConfig(calib="x", statistics="y"), "give `calib` or `statistics`"),
        (
            lambda: CalibrationConfig(calib_seq=9, statistics="y"),
            "`calib_seq` has no effect with `statistics`; remove it",
        ),
        (lambda: Runtime(threads=0), "`threads=0`: give a whole number of at least 1"),
        (lambda: Runtime(device_memory=0), "`device_memory=0`"),
        (lambda: OutputConfig(shards=-1), "`shards=-1`"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`calib_size=0`: give more.", "--calib-size 0: give more."),
        ("give `calib` or `statistics`, not both.", "give --calib or --calibration, not both."),
        ("Use `overwrite=True`.", "Use --overwrite."),
        ("Run `fourfold merge`, or `nonsense=1`.", "Run `fourfold merge`, or `nonsense=1`."),
    ],
)
def test_the_command_line_speaks_of_options(message: str, shown: str) -> None:
    assert as_options(message) == shown

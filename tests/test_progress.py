# SPDX-License-Identifier: Apache-2.0
"""Progress: what a terminal, a notebook or a log shows of a run, also to callers from Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fourfold.events import (
    BatchCalibrated,
    BytesQuantized,
    BytesVerified,
    DataLoaded,
    Event,
    LayerCalibrated,
    OutputComplete,
    Resumed,
    ShardWritten,
    TokenGenerated,
    WarningIssued,
    WindowEvaluated,
    WritingBegan,
)
from fourfold.run.progress import ProgressDisplay, default_display
from fourfold.run.stages import Stages, duration

GB = 10**9


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_is_shown_on_a_terminal_or_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_display(None) is None  # stderr is captured
    assert default_display(False) is None
    assert default_display(True) is not None
    terminal = StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", terminal)
    assert default_display(None) is not None
    assert default_display(False) is None


def test_one_rank_alone_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert default_display(True) is None


def w4a16(seconds: int) -> Iterator[tuple[float, Event]]:
    """Events of a run of 1 GB/s, with the time of each: ten a second."""
    total = seconds * GB
    for tenth in range(10 * seconds + 1):
        yield tenth / 10, BytesQuantized(tenth * GB // 10, total)


def calibrated() -> Iterator[tuple[float, Event]]:
    """Four layers of two batches: 6 s for a layer, then 4 s to quantize its 8 GB."""
    yield 0, BytesQuantized(0, 32 * GB)
    now = 0.0
    for layer in range(4):
        for batch in range(3):
            now += 3 * (batch > 0)
            done = 1000 * layer + 500 * batch
            yield now, BatchCalibrated(layer, 4, batch, 2, done, 4000)
        for part in range(1, 5):
            now += 1
            yield now, BytesQuantized((8 * layer + 2 * part) * GB, 32 * GB)


def shown(events: Iterable[tuple[float, Event]], **options: object) -> str:
    """What a display that is no terminal shows of events at their times."""
    clock, file = Clock(), StringIO()
    began = clock.now
    with ProgressDisplay(Console(file=file, **options), clock=clock) as display:  # type: ignore[arg-type]
        for now, event in events:
            clock.now = began + now
            display(event)
    return file.getvalue()


def test_every_event_is_shown() -> None:
    events: list[Event] = [
        DataLoaded(8, 32, 250, "ids.jsonl", is_embedded=False, beginning="It was"),
        WritingBegan(Path("out")),
        Resumed(1, 4),
        BytesQuantized(0, 40),
        BatchCalibrated(0, 3, 1, 2, 100, 600),
        LayerCalibrated(0, 3),
        BytesQuantized(10, 40),
        ShardWritten("layer 0", 1, 4, 10, 40),
        WarningIssued("slower kernels"),
        OutputComplete(Path("out")),
        BytesVerified(20, 40),
        TokenGenerated("source", 1, 3),
        WindowEvaluated("out", 1, 3, 16, 24),
    ]
    text = shown((20.0 * number, event) for number, event in enumerate(events))
    assert "calibrating on 8 samples of 32 tokens from ids.jsonl" in text
    assert "resuming an unfinished run: 1 of 4 shards are finished" in text
    assert "calibrating: layer 1/3 · batch 1/2" in text
    assert "quantizing: 10 B of 40 B" in text
    assert "warning: slower kernels" in text
    assert "verifying: 20 B of 40 B" in text
    assert "source: token 1/3" in text
    assert "evaluating: out · layer 2/3" in text


def test_two_minutes_leave_readable_lines() -> None:
    lines = shown(w4a16(120)).splitlines()
    assert 8 <= len(lines) <= 16
    assert "\x1b" not in "".join(lines)
    assert lines[0].startswith("quantizing: 10.0 GB of 120.0 GB · 1.0 GB/s · about ")
    assert "about 110 s left" in lines[0] or "about 2 min left" in lines[0]
    assert lines[-1].startswith("quantizing: 120.0 GB of 120.0 GB · 1.0 GB/s")
    assert all(line.endswith(" of memory") for line in lines)


def test_a_long_run_leaves_no_more_lines_than_one_reads() -> None:
    day = 24 * 3600
    lines = shown((now, BytesQuantized(now * GB, day * GB)) for now in range(0, day, 5))
    assert 100 < len(lines.splitlines()) < 500


def test_a_short_run_leaves_none() -> None:
    assert shown(w4a16(5)) == ""


def test_lines_are_not_cut_to_a_width_that_nobody_has() -> None:
    warning = WarningIssued("long " * 60)
    assert len(shown([(0, warning)], width=60).splitlines()) == 1


def test_calibration_and_quantization_have_rates_of_their_own() -> None:
    stages = Stages(0.0)
    for now, event in calibrated():
        stages.see(event, now)
        if now == 10 and isinstance(
            event, BytesQuantized
        ):  # a layer of four is done: 6 s for its tokens, 4 s for its bytes
            assert stages.stages["calibrating"].text == "layer 1/4 · batch 2/2 · 41.7 tokens/s"
            assert stages.stages["quantizing"].text == "8.0 GB of 32.0 GB · 2.0 GB/s"
            assert stages.seconds_left == pytest.approx(30)
        if now < 7:
            assert stages.seconds_left is None  # nobody knows how fast it quantizes
    assert stages.seconds_left == 0
    assert stages.unfinished == []


def test_the_first_bytes_give_no_rate() -> None:
    stages = Stages(0.0)
    stages.see(BytesQuantized(0, 2 * GB), 0)
    stages.see(BytesQuantized(64, 2 * GB), 80)  # a norm, after a layer's codes were chosen
    assert stages.stages["quantizing"].text == "64 B of 2.0 GB"
    assert stages.seconds_left is None
    stages.see(BytesQuantized(GB, 2 * GB), 100)
    assert stages.seconds_left == pytest.approx(100)


def test_a_resumed_run_stands_in_the_whole() -> None:
    stages = Stages(0.0)
    stages.see(BytesQuantized(30 * GB, 40 * GB), 0)
    stages.see(BytesQuantized(32 * GB, 40 * GB), 4)
    assert stages.stages["quantizing"].text == "32.0 GB of 40.0 GB · 500.0 MB/s"
    assert stages.seconds_left == 16


@pytest.mark.parametrize("width", [30, 60, 200])
def test_bars_fit_the_terminal(width: int) -> None:
    clock, file = Clock(), StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    display = ProgressDisplay(console, clock=clock)
    for now, event in calibrated():
        if now > 15:
            break
        clock.now = 100 + now
        display(event)
    console.print(display)
    calibrating, quantizing, last = file.getvalue().splitlines()
    assert max(map(len, (calibrating, quantizing, last))) <= width
    assert calibrating.startswith("calibrating ")
    if width >= 60:
        assert calibrating.endswith("layer 2/4 · batch 1/2 · 41.7 tokens/s")
        assert "━" in quantizing
        assert quantizing.endswith("8.0 GB of 32.0 GB · 2.0 GB/s")
        assert last.startswith("13 s · about ")
        assert "of memory" in last


def test_durations() -> None:
    assert [duration(x) for x in (0.4, 75, 130, 7300)] == ["0 s", "75 s", "2 min", "2 h 2 min"]


def test_what_a_command_leaves_in_a_file(capsys) -> None:
    """`fourfold quantize … 2>err`, over two minutes."""
    from fourfold.cli.progress import CommandDisplay

    clock, heading = Clock(), "fourfold 1.0: quantizing MODEL into OUT, recipe mine"
    with CommandDisplay(heading, quiet=False, clock=clock) as display:
        for now, event in w4a16(120):
            clock.now = 100 + now
            display(event)
        display(WarningIssued("`calib_size=3`: too few"))
    first, *lines, last = capsys.readouterr().err.splitlines()
    assert first == heading
    assert 8 <= len(lines) <= 16
    assert lines[1].startswith("quantizing: 20.0 GB of 120.0 GB · 1.0 GB/s · about ")
    assert last == "warning: --calib-size 3: too few"
    with CommandDisplay(heading, quiet=True, clock=clock) as display:
        for now, event in w4a16(120):
            clock.now = 1000 + now
            display(event)
        display(WarningIssued("too few"))
    assert capsys.readouterr().err == "warning: too few\n"

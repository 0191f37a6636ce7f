"""Progress: what a terminal shows of a run, also to callers from Python."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fourfold.events import (
    BytesVerified,
    DataLoaded,
    LayerCalibrated,
    OutputComplete,
    Resumed,
    ShardWritten,
    TokenGenerated,
    WarningIssued,
    WritingBegan,
)
from fourfold.run.progress import ProgressDisplay, default_display


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


def test_every_event_is_shown() -> None:
    shown = StringIO()
    with ProgressDisplay(Console(file=shown, width=120)) as display:
        for event in (
            DataLoaded(8, 32, 250, "ids.jsonl", is_embedded=False, beginning="It was"),
            WritingBegan(Path("out")),
            Resumed(1, 4),
            LayerCalibrated(0, 3),
            ShardWritten("layer 0", 1, 4, 10, 40),
            WarningIssued("slower kernels"),
            OutputComplete(Path("out")),
            BytesVerified(20, 40),
            TokenGenerated("source", 1, 3),
        ):
            display(event)
    text = shown.getvalue()
    assert "calibrating on 8 samples of 32 tokens from ids.jsonl" in text
    assert "resuming an unfinished run: 1 of 4 shards are finished" in text
    assert "layer 0: shard 1/4" in text
    assert "warning: slower kernels" in text

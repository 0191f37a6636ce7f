# SPDX-License-Identifier: Apache-2.0
"""Checks that protect what lies in OUT. They change nothing.

A run may replace only what an earlier run of fourfold wrote, by that run's own lists of files
(`run.json` of an unfinished run, `quant_summary.json` of a finished one), and only if it was asked
to. Everything else in OUT belongs to the user.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fourfold.errors import OutputError
from fourfold.storage.names import CONFIG, SUMMARY
from fourfold.storage.run_state import STATE, RunState, differences, names_in, read_record

SHOWN_DIFFERENCES = 3


def check_location(out: Path, source: Path, what: str) -> None:
    """Refuse an output folder that lies in or around `source`, from which `what` is read."""
    resolved, model = out.resolve(), source.resolve()
    if resolved == model or model in resolved.parents:
        raise OutputError(f"{out}: lies inside {what}'s folder. Choose another.")
    if resolved in model.parents:
        raise OutputError(f"{out}: {what} lies inside it. Choose another folder.")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file. Choose a folder.")


def check_contents(out: Path, state: RunState, *, overwrite: bool) -> None:
    """Refuse a folder that holds anything but what this run may replace or resume."""
    present = sorted(os.listdir(out))
    others = [name for name in present if name != STATE]
    if not others:
        return
    if not earlier_files(out, state) and (overwrite or STATE in present):
        raise OutputError(
            f"{out}: holds {others[0]}, … but no checkpoint that fourfold wrote. "
            "Choose another folder, or empty this one yourself."
        )
    run = state.run
    is_whole = run is None or ("identity" not in run and CONFIG in present)
    if is_whole and not overwrite:
        is_finished = CONFIG in present and SUMMARY in present
        hint = (
            "If its run was stopped while it verified, make up for that: `fourfold verify`, with "
            "`source=MODEL`. "
        )
        raise OutputError(
            f"{out}: not empty ({others[0]}, …). {hint if is_finished else ''}Choose another "
            "folder, or give `overwrite=True`."
        )


def check_resumable(out: Path, state: RunState, identity: Mapping[str, Any] | None) -> None:
    """Refuse an unfinished run other than `identity`, or one that cannot be resumed."""
    if state.run is None or not state.has_finished_shards:
        return
    if identity is None or state.identity is None:
        raise OutputError(
            f"{out}: holds an unfinished run that cannot be resumed. "
            "`overwrite=True` starts over in its place."
        )
    changed = list(differences(state.identity, identity))
    if changed:
        shown = "; ".join(changed[:SHOWN_DIFFERENCES])
        hidden = len(changed) - SHOWN_DIFFERENCES
        more = f" (and {hidden} more)" if hidden > 0 else ""
        raise OutputError(
            f"{out}: holds an unfinished run of something else. Changed since: {shown}{more}.\n"
            "Give the same as before to resume it, or give `overwrite=True` to start over."
        )


def check_not_in_the_way(out: Path, files: Sequence[str], earlier: Collection[str]) -> None:
    """Refuse files that would be overwritten, but are not of an earlier checkpoint."""
    for name in files:
        path = out / name
        if os.path.lexists(path) and (name not in earlier or path.is_dir()):
            raise OutputError(
                f"{path}: is in the way, and not part of an earlier checkpoint. "
                "Move it, or choose another folder."
            )


def earlier_files(out: Path, state: RunState) -> list[str]:
    """Return the files that an earlier run lists as its own, finished or not."""
    return list(dict.fromkeys([*names_in(state.run), *names_in(read_record(out / SUMMARY))]))

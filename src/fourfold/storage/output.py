# SPDX-License-Identifier: Apache-2.0
"""The folder OUT while a run writes it: whole at the end, or absent, or resumable.

    check ─▶ lock ─▶ begin ─▶ shards, then all other files, config.json last ─▶ done
                       │                                                          │
             resumes, or clears                              the run's state is removed

A folder without `config.json` and the index is not a checkpoint, and no engine loads it. They are
written last and removed first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fourfold.errors import OutputError
from fourfold.storage.atomic import FileWriter, partial_of, sync
from fourfold.storage.disk import writing
from fourfold.storage.names import CONFIG, INDEX
from fourfold.storage.output_checks import (
    check_contents,
    check_location,
    check_not_in_the_way,
    check_resumable,
    earlier_files,
)
from fourfold.storage.run_state import RunState, names_in
from fourfold.storage.shard_file import ShardFile


class OutputFolder(FileWriter):
    """The folder that a run writes: in the end a checkpoint, nothing, or what can be resumed."""

    def __init__(
        self,
        folder: Path,
        rank: int = 0,
        *,
        markers: Sequence[str] = (),
        overwrite: bool = False,
    ) -> None:
        """Describe the folder; nothing is read or written yet.

        Args:
            folder, rank: The folder to write, and this process's rank.
            markers: Files of the layout that make the folder a checkpoint, beside config.json and
                the index. They are written last and removed first.
            overwrite: True starts over, and may replace what an earlier run of fourfold wrote.
        """
        super().__init__(folder)
        self.markers = (CONFIG, INDEX, *markers)
        self.overwrite = overwrite
        self.state = RunState(folder, rank)
        self.is_begun = False
        """True once this rank has made the folder this run's own, to keep or to remove."""
        self.has_cleared = False
        """True once this run has removed an earlier checkpoint."""
        self._made_folder = False

    def check(self, source: Path, what: str = "the model") -> None:
        """Check that the folder may be written by a run that reads `what` from `source`.

        Raises:
            OutputError: It lies inside `source` or around it, another process writes it, or it
                holds what may not be replaced.
        """
        check_location(self.folder, source, what)
        if not self.folder.exists():
            return
        if self.state.folder.is_symlink():
            raise OutputError(
                f"{self.state.folder}: is a link. Remove it, or choose another folder."
            )
        with writing(self.folder):
            self.state.check_free()
            check_contents(self.folder, self.state, overwrite=self.overwrite)

    def check_resumable(self, identity: Mapping[str, Any] | None) -> None:
        """Raise `OutputError` if the folder holds an unfinished run other than `identity`."""
        if not self.overwrite:
            check_resumable(self.folder, self.state, identity)

    def lock(self, token: str) -> None:
        """Make the folder, and let no other process write into it; see `RunState.lock`."""
        with writing(self.folder):
            self._made_folder = not self.folder.exists()
            self.state.lock(token)

    def begin(self, identity: Mapping[str, Any] | None, files: Sequence[str]) -> None:
        """Make the folder this run's own: resume the unfinished run in it, or clear it.

        Args:
            identity: What must be the same for the run to be resumed; None if it cannot be.
            files: Every file that this run will write.

        Raises:
            OutputError: The folder's contents have changed since `check`, or one of `files` is
                there and not part of an earlier checkpoint.
        """
        with writing(self.folder):
            check_contents(self.folder, self.state, overwrite=self.overwrite)
            self.check_resumable(identity)
            has_run = self.state.run is not None and self.state.has_finished_shards
            if has_run and not self.overwrite:
                self.is_begun = True
                self._remove_partial(files)
                return
            earlier = earlier_files(self.folder, self.state)
            check_not_in_the_way(self.folder, files, set(earlier))
            # If the run is killed while it clears, the list still says what is fourfold's.
            self.state.begin({"files": [*earlier, *files]})
            self.is_begun = True
            self.has_cleared = (self.folder / CONFIG).exists()
            self.remove(earlier)
            self.state.begin({"files": list(files), "identity": identity})

    def shard(self, name: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> ShardFile:
        self.written.append(name)
        return ShardFile(self.folder / name, tensors)

    def finish_shard(self, shard: ShardFile, record: Mapping[str, Any]) -> None:
        """Flush a full shard to the disk; `record` it, with its digest, for a run that resumes."""
        self.check_mine()  # files of the same name may be another run's by now
        try:
            digest = shard.finish()
        except OutputError:
            self.check_mine()
            raise
        with writing(self.state.folder):
            self.state.add_shard(shard.path.name, {"digest": digest, **record})

    def check_mine(self) -> None:
        """Raise `OutputError` if the folder was removed or replaced since it was locked."""
        if not self.state.is_mine:
            raise OutputError(
                f"{self.folder}: was removed or moved away while it was written. Start again."
            )

    def nbytes_present(self) -> int:
        """Return the bytes of files that are an unfinished run's own: they need no more room."""
        files = [self.folder / name for name in names_in(self.state.run)]
        return sum(path.stat().st_size for path in files if path.is_file())

    def done(self) -> None:
        """Remove the run's state: the checkpoint is whole."""
        with writing(self.folder):
            self.state.remove()
            sync(self.folder)

    def release(self) -> None:
        """Release the folder and remove whatever this run created in it beside its files."""
        with suppress(OSError):  # other ranks may do the same at this moment
            if self.is_begun or (self.state.is_mine and self.state.run is None):
                self.state.remove()
            if self._made_folder:
                folders = sorted(filter(Path.is_dir, self.folder.rglob("*")), reverse=True)
                for folder in [*folders, self.folder]:
                    if not any(folder.iterdir()):
                        folder.rmdir()
        self.state.release()

    def discard(self) -> None:
        """Remove the unfinished run and release the folder.

        A rank that did not begin the run removes only the files that it wrote itself. Nothing
        happens if another process has taken the folder.
        """
        if self.state.is_mine:
            names = names_in(self.state.run) if self.is_begun else []
            self.remove([*self.written, *names])
            self.release()

    def keep_unfinished(self) -> None:
        """Keep finished shards and their records, and nothing that makes OUT a checkpoint."""
        if self.state.is_mine:
            self.remove([name for name in self.markers if name in self.written])
            self._remove_partial(self.written)
            self.state.release()

    def remove(self, files: Sequence[str]) -> None:
        """Remove files, finished or not, first of all those that make the folder a checkpoint."""
        for name in [*(marker for marker in self.markers if marker in files), *files]:
            (self.folder / name).unlink(missing_ok=True)
        self._remove_partial(files)

    def _remove_partial(self, names: Iterable[str]) -> None:
        for name in names:
            partial_of(self.folder / name).unlink(missing_ok=True)

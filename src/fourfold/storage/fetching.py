# SPDX-License-Identifier: Apache-2.0
"""What a run tells a source whose weights are fetched to this machine while it reads them.

A source that has all of them already has nothing to do here: `Fetching` itself ignores everything.
Tensors are named by the raw keys under which they lie in files; see `Source.stored_keys`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from fourfold.errors import UsageError


class Fetching:
    """The weights of a source that lie on this machine, all of them, to stay.

    Attributes:
        revision: The exact place that the weights are fetched from, which an unfinished run
            continues with; None if there is none.
        is_here: True if every weight lies on this machine when the source is opened.
        is_transient: True if weights are deleted once nothing will read them any more.
        scratch_bytes: The most bytes of such weights that lie in OUT at a time.
    """

    revision: str | None = None
    is_here: bool = True
    is_transient: bool = False
    scratch_bytes: int = 0

    def peeking(self) -> AbstractContextManager[None]:
        """Within, little is read of a few tensors: no file is fetched for it."""
        return nullcontext()

    def settle(self, out: Path, needed: int, keep: bool | None, *, ranks: int = 1) -> Sequence[str]:
        """Decide where weights are fetched to, and whether they stay there.

        Args:
            out: The folder that the run writes; nothing is created in it before `expect`.
            needed: Bytes that the run will write there.
            keep: What the user wants; None lets the room on the disks decide.
            ranks: The ranks that fetch on this machine.

        Returns:
            Remarks for the user.

        Raises:
            ResourceError: A disk has too little room.
            UsageError: `keep` is given, and nothing is fetched.
        """
        if keep is not None:
            raise UsageError(f"`keep_source={keep}`: only for a model on the hub; leave it out.")
        return ()

    def expect(self, keys: Iterable[str]) -> None:
        """Say which tensors will be read from now on, in this order, as often as they are named."""

    def done_with(self, keys: Iterable[str]) -> None:
        """Say of each of these tensors that it was read for one of the times it was expected."""

    def interrupt(self) -> None:
        """Fetch nothing more, and let reads that wait for weights fail: the run has ended."""

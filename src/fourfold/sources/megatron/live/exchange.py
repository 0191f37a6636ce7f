"""Boxes of parameters, wherever they lie: here, or on another rank that is asked for them.

Every rank answers, on a thread of its own, whoever asks for rows of what it has; so each may read
whatever it needs, at any time, from any of its threads, and no order has to be kept. What travels
goes through gloo and the CPUs' memory, a slab at a time, also where the model is on GPUs; the
process group is one of its own, so that nothing of the training's is in its way.

    asks      [tag, part, begin₀, end₀, begin₁, …]     to the owner, under the tag REQUEST
    answers   [bytes, or -1]  [the bytes, row-major]   to who asked, under the tag it gave
    leaves    [0, …]                                   to every other rank

A rank answers until all others have left.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fourfold.errors import FourfoldError, SourceError
from fourfold.sources.megatron.boxes import Box

REQUEST = 1
FIRST_TAG, LAST_TAG = 2, 1 << 30
DIMENSIONS = 8
WORDS = 2 + 2 * DIMENSIONS

PATIENCE = timedelta(days=30)
"""A rank may have nothing to ask for as long as the others work: gloo must not give up then, since
it breaks all connections when it does. Who dies closes its connections."""

FAREWELL = 10.0
"""Seconds to wait for ranks that should have left."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Exchange:
    """This rank and the others of the default process group. Safe for many threads."""

    def __init__(self) -> None:
        """All ranks make it together."""
        is_shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if is_shared else 0
        self.size = dist.get_world_size() if is_shared else 1
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if is_shared else None
        self._tags = itertools.count(FIRST_TAG)
        self._parts: Sequence[torch.Tensor] = ()
        self._server: threading.Thread | None = None

    def agree(self, value: Any, error: BaseException | None = None) -> list[Any]:
        """What every rank gives, by rank; a collective. An error of one is raised on all."""
        if self._group is None:
            found: list[Any] = [(value, None)]
        else:
            found = [None] * self.size
            text = None if error is None else str(error) or repr(error)
            dist.all_gather_object(found, (value, text), group=self._group)
        if error is not None:
            raise error
        for rank, (_, text) in enumerate(found):
            if text is not None:
                raise FourfoldError(f"rank {rank}: {text}")
        return [each for each, _ in found]

    def serve(self, parts: Sequence[torch.Tensor]) -> None:
        """From now on, others may ask for these."""
        self._parts = parts
        if self._group is not None:
            self._server = threading.Thread(
                target=self._answer_all, args=(self._group,), name="serve", daemon=True
            )
            self._server.start()

    def read(self, owners: Mapping[int, int], box: Box, out: Bytes, name: str) -> None:
        """Fill `out` with a box of a part, row-major. owners: rank → the part's number there."""
        if self.rank in owners:
            out[:] = _bytes_of(self._parts[owners[self.rank]], box)
            return
        ranks = sorted(owners)
        owner = ranks[self.rank % len(ranks)]
        try:
            self._ask(owner, owners[owner], box, out)
        except RuntimeError as error:  # what torch.distributed raises where a rank has gone
            cause = str(error).splitlines()[0][:200]
            raise SourceError(
                f"{name}: rank {owner}, which has it, does not answer: {cause}."
            ) from error

    def close(self) -> None:
        """Leave, when all others do; after a failure, when they should have."""
        group, self._group = self._group, None
        if group is None:
            return
        if self._server is not None:
            self._say_goodbye(group)
            self._server.join(FAREWELL)
        if self._server is None or not self._server.is_alive():
            dist.destroy_process_group(group)

    def _say_goodbye(self, group: Any) -> None:
        goodbye = torch.zeros(WORDS, dtype=torch.int64)
        works: list[Any] = []
        with suppress(RuntimeError, ValueError):  # who has gone needs none
            for other in range(self.size):
                if other != self.rank:
                    works.append(dist.isend(goodbye, other, group, REQUEST))
        for work in works:
            with suppress(RuntimeError):
                work.wait(timedelta(seconds=FAREWELL))

    def _ask(self, owner: int, part: int, box: Box, out: Bytes) -> None:
        tag = FIRST_TAG + next(self._tags) % (LAST_TAG - FIRST_TAG)
        words = [tag, part, *itertools.chain.from_iterable(box)]
        request = torch.tensor([*words, *[0] * (WORDS - len(words))])
        dist.send(request, owner, self._group, tag=REQUEST)
        nbytes = torch.empty(1, dtype=torch.int64)
        dist.recv(nbytes, owner, self._group, tag=tag)
        if int(nbytes) != len(out):
            raise RuntimeError("it failed")
        dist.recv(torch.from_numpy(out), owner, self._group, tag=tag)

    def _answer_all(self, group: Any) -> None:
        left = self.size - 1
        request = torch.empty(WORDS, dtype=torch.int64)
        with suppress(RuntimeError):  # a rank has gone: those that work find out by themselves
            while left:
                asker = dist.recv(request, None, group, tag=REQUEST)
                tag, part, *spans = request.tolist()
                if tag:
                    self._answer(group, asker, tag, self._parts[part], spans)
                else:
                    left -= 1

    def _answer(
        self, group: Any, asker: int, tag: int, part: torch.Tensor, spans: Sequence[int]
    ) -> None:
        box = tuple(zip(spans[::2], spans[1::2], strict=True))[: part.ndim]
        try:
            data = torch.from_numpy(_bytes_of(part, box))
        except Exception:  # an accelerator's memory, or its driver
            dist.send(torch.tensor([-1]), asker, group, tag=tag)
            return
        dist.send(torch.tensor([data.numel()]), asker, group, tag=tag)
        dist.send(data, asker, group, tag=tag)


def _bytes_of(tensor: torch.Tensor, box: Box) -> Bytes:
    """The bytes of a box of a tensor, row-major."""
    inner = tensor[tuple(slice(*span) for span in box)] if box else tensor
    values: Bytes = inner.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    assert len(values) == math.prod(stop - start for start, stop in box) * tensor.element_size()
    return values

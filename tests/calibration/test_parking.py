# SPDX-License-Identifier: Apache-2.0
"""Proves that activations come back as they went, wherever they waited, and that nothing stays.

Tensors are what frames hold: views, expanded and shared ones, masks, empty ones. A storage that
is away has no bytes; after `fetch` every view of it is as before, bit for bit.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fourfold.calibration.activations import weakly
from fourfold.calibration.parking import Parking, held_by_model, tensors_in
from fourfold.errors import OutputError

KIB = 1024


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Callable[..., Parking]]:
    """Makes a `Parking` in a folder of its own, with nothing that it must keep."""
    made: list[Parking] = []

    def make(limit: int | None, kept: tuple[torch.Tensor, ...] = ()) -> Parking:
        made.append(Parking(limit=limit, folder=tmp_path, smallest=64))
        made[-1].begin(kept)
        return made[-1]

    yield make
    for each in made:
        each.close()


def random(nbytes: int = KIB, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def is_away(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == 0 and tensor.numel() > 0


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


TENSORS = {
    "float32": lambda: random().view(torch.float32).clone(),
    "bfloat16": lambda: random().view(torch.bfloat16).clone(),
    "int64": lambda: random().view(torch.int64).clone(),
    "bool mask": lambda: random() > 127,
    "complex": lambda: random().view(torch.float32).view(torch.complex64).clone(),
    "NaN": lambda: torch.full((64,), float("nan")),
    "a view": lambda: random().reshape(32, 32)[3:7, ::2],
    "transposed": lambda: random().view(torch.float32).reshape(16, 16).T,
    "expanded": lambda: random(128)[:, None].expand(128, 1000),
    "a row of many": lambda: random(64 * KIB).reshape(64, -1)[5],
    "flipped": lambda: random().flip(0),
}


@pytest.mark.parametrize("what", TENSORS)
def test_what_comes_back_is_what_went(what: str, place: Callable[..., Parking]) -> None:
    tensor = TENSORS[what]()
    view, copy, pointer = tensor[..., :8], tensor.clone(), tensor.untyped_storage()._cdata
    parked = place(0)
    parked.park(0, ((tensor,), {"also": tensor}))
    assert is_away(tensor)
    parked.fetch(0)
    assert tensor.untyped_storage()._cdata == pointer
    for one, other in ((tensor, copy), (view, copy[..., :8])):
        assert one.shape == other.shape
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def test_views_of_one_storage_go_once(place: Callable[..., Parking]) -> None:
    base = random(4 * KIB)
    views = [base[i * KIB : (i + 1) * KIB] for i in range(4)]
    copies = [view.clone() for view in views]
    parked = place(0)
    parked.park(0, (views, {"again": views[::-1], "nested": [{"deep": (base,)}]}))
    assert parked.written == base.nbytes
    assert is_away(base)
    parked.fetch(0)
    assert all(torch.equal(view, copy) for view, copy in zip(views, copies, strict=True))


@pytest.mark.parametrize("nbytes", [0, 63])
def test_what_is_small_stays(nbytes: int, place: Callable[..., Parking]) -> None:
    tensor, parked = random(nbytes), place(0)
    parked.park(0, ((tensor,), {}))
    assert not is_away(tensor)
    assert (parked.written, parked.resident) == (0, 0)
    parked.fetch(0)
    assert torch.equal(tensor, random(nbytes))


def test_what_is_kept_stays(place: Callable[..., Parking]) -> None:
    """The model's own buffers, and the caller's tensors: also through a view."""
    buffer, other = random(seed=1), random(seed=2)
    parked = place(0, (buffer[3:], torch.empty(9, device="meta")))
    parked.park(0, ((buffer.reshape(32, 32).T, other), {}))
    assert not is_away(buffer)
    assert is_away(other)
    parked.fetch(0)
    assert torch.equal(buffer, random(seed=1))


def test_storages_that_cannot_be_resized_stay(place: Callable[..., Parking]) -> None:
    tensor = torch.from_numpy(random().numpy().copy())
    parked = place(0)
    parked.park(0, ((tensor,), {}))
    assert torch.equal(tensor, random())
    parked.fetch(0)


def test_things_that_hold_no_tensor(place: Callable[..., Parking]) -> None:
    parked = place(0)
    parked.park(0, ((None, 3, "text", object()), {"cache": SimpleNamespace(), "flags": {True}}))
    parked.fetch(0)
    parked.fetch(0)  # nothing is there any more
    assert list(tensors_in({"a": [None, (torch.empty(2, device="meta"),)]})) == []


def test_what_two_calls_hold_is_whole_for_both(place: Callable[..., Parking]) -> None:
    shared, own = random(seed=1), [random(seed=2), random(seed=3)]
    view, parked = shared[5:], place(0)
    parked.park(0, ((shared, own[0]), {}))
    assert is_away(shared)
    parked.park(1, ((view, own[1]), {}))
    assert not is_away(shared)
    assert torch.equal(shared, random(seed=1))
    assert is_away(own[0])
    assert is_away(own[1])
    for call in (0, 1):
        parked.fetch(call)
        assert torch.equal(own[call], random(seed=2 + call))
        parked.park(call, ((shared, own[call]), {}))  # at the next door
        assert not is_away(shared)
        assert torch.equal(shared, random(seed=1))
    parked.fetch(0)
    parked.fetch(1)


# --- what only an earlier door was given --------------------------------------------------------


def test_what_a_frame_keeps_goes_away_at_every_door(place: Callable[..., Parking]) -> None:
    embeds, parked = random(seed=1), place(0)
    given = embeds
    for door in range(1, 5):
        parked.park(0, ((given,), {}))
        assert is_away(embeds)
        assert is_away(given)
        parked.fetch(0)
        assert torch.equal(embeds, random(seed=1))
        embeds += 1  # whoever holds it may change it
        embeds -= 1
        given = random(seed=1 + door)
    assert parked.written == 7 * KIB


def test_what_a_frame_keeps_counts(place: Callable[..., Parking]) -> None:
    kept, given, parked = random(seed=1), random(seed=2), place(None)
    parked.park(0, ((kept,), {}))
    parked.fetch(0)
    parked.park(0, ((given,), {}))
    assert parked.resident == parked.peak == 2 * KIB
    parked.fetch(0)
    assert parked.resident == 0


def test_what_was_changed_between_two_doors_comes_back_changed(
    place: Callable[..., Parking],
) -> None:
    kept, parked = random(seed=1), place(0)
    parked.park(0, ((kept,), {}))
    parked.fetch(0)
    kept.copy_(random(seed=2))
    parked.park(0, ((random(seed=3),), {}))
    assert is_away(kept)
    parked.fetch(0)
    assert torch.equal(kept, random(seed=2))


def test_what_nobody_holds_is_forgotten(place: Callable[..., Parking]) -> None:
    kept, parked = random(seed=1), place(0)
    parked.park(0, ((kept,), {}))
    parked.fetch(0)
    reference = weakly(kept.untyped_storage())
    del kept
    assert reference.expired(), "parking keeps it"  # type: ignore[no-untyped-call]
    given = random(seed=2)
    parked.park(0, ((given,), {}))
    assert parked.written == 2 * KIB
    assert len(parked._seen[0]) == 1
    parked.fetch(0)


def test_what_a_frame_keeps_and_another_call_is_given_is_whole(
    place: Callable[..., Parking],
) -> None:
    kept, parked = random(seed=1), place(0)
    parked.park(0, ((kept,), {}))
    parked.fetch(0)
    parked.park(0, ((random(seed=2),), {}))
    assert is_away(kept)
    parked.park(1, ((kept,), {}))
    for call in (0, 1):
        assert torch.equal(kept, random(seed=1))
        parked.fetch(call)
        parked.park(call, ((), {}))
    assert torch.equal(kept, random(seed=1))


def test_nothing_is_taken_for_a_tensor_that_is_gone(place: Callable[..., Parking]) -> None:
    """Freed embeddings leave an address that the next activation may get."""
    buffers = [random(seed=seed) for seed in range(20)]
    parked = place(0, tuple(buffers))
    del buffers
    tensors = [random(seed=seed) for seed in range(20)]
    parked.park(0, (tensors, {}))
    assert all(map(is_away, tensors))
    parked.fetch(0)


# --- what a model's frames hold -----------------------------------------------------------------


class Door(nn.Module):
    """A layer that calls `see` with its own frame, like a hook at its door."""

    def __init__(self, see: Callable[[FrameType], None]) -> None:
        super().__init__()
        self.see = see

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.see(sys._getframe())
        return x + 1


class Model(nn.Module):
    """Keeps its embeddings and a mask for another layer; what surrounds `forward` is not its."""

    def __init__(self, see: Callable[[FrameType], None], beside: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.watch = Door(see), lambda: beside
        forward = self.forward
        self.forward = lambda *args: (forward(*args), beside)[0]

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        embeds = ids.float()
        masks: dict[str, Any] = {"full": mask[None], "sliding": [embeds > 3], "none": None}
        masks["itself"] = (masks, embeds.to("meta"), embeds.to_sparse())
        hidden = self.layer(embeds[:, None] * 2)
        del embeds
        return self.layer(hidden)


def test_the_variables_of_the_models_frames_are_found() -> None:
    """Not what the model was called with, nor what lies around the call; nothing stays behind."""
    found: list[set[tuple[tuple[int, ...], torch.dtype]]] = []
    storages: list[Any] = []

    def see(frame: FrameType) -> None:
        held = held_by_model(frame)
        found.append({(tuple(each.shape), each.dtype) for each in held})
        storages.append([weakly(each.untyped_storage()) for each in held])

    around = torch.ones(77)
    Model(see, around)(torch.arange(8), torch.ones(8, 8))
    embeds, sliding, hidden = ((8,), torch.float32), ((8,), torch.bool), ((8, 1), torch.float32)
    assert found == [{embeds, sliding, hidden}, {sliding, hidden}]
    gc.collect()  # the mask is in a cycle
    assert all(each.expired() for held in storages for each in held)


def test_looking_at_a_frame_keeps_nothing_alive() -> None:
    gone: list[bool] = []

    class Rebinds(nn.Module):
        def forward(self, x: torch.Tensor) -> None:
            hidden, mine = x + 1, locals() if x.numel() > 3 else {}
            reference = weakly(hidden.untyped_storage())
            assert any(each is hidden for each in held_by_model(sys._getframe()))
            hidden = x
            gone.append(reference.expired())
            assert x.numel() <= 3 or "x" in mine, "what the function took itself was emptied"

    Rebinds()(torch.ones(3))
    assert gone == [True]
    Rebinds()(torch.ones(4))


def test_without_a_model_no_frame_is_its() -> None:
    tensor = random()
    assert held_by_model(sys._getframe()) == []
    assert not is_away(tensor)


# --- memory and disk ----------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 0, 1, 1500, 2048, 5000, 1 << 30])
def test_the_limit_holds(limit: int | None, place: Callable[..., Parking]) -> None:
    tensors = [random(KIB, seed) for seed in range(6)]
    parked = place(limit)
    for number, tensor in enumerate(tensors):
        parked.park(number, ((tensor,), {}))
        here = KIB * sum(not is_away(each) for each in tensors[: number + 1])
        assert parked.resident == here
        assert here <= (limit if limit is not None else here)
    fit = 6 if limit is None else min(6, limit // KIB)
    assert parked.resident == parked.peak == fit * KIB
    assert parked.written == (6 - fit) * KIB
    for number, tensor in enumerate(tensors):
        parked.fetch(number)
        assert torch.equal(tensor, random(KIB, number))
    assert parked.resident == 0
    assert parked.peak == fit * KIB


def test_the_file_does_not_grow_without_end(
    place: Callable[..., Parking], monkeypatch: pytest.MonkeyPatch
) -> None:
    parked = place(0)
    tensors = [random(KIB, 1), random(2 * KIB, 2)]
    for _ in range(20):
        for number, tensor in enumerate(tensors):
            parked.park(number, ((tensor,), {}))
        for number, tensor in enumerate(tensors):
            parked.fetch(number)
            assert torch.equal(tensor, random((1 + number) * KIB, 1 + number))
    assert parked.written == 60 * KIB
    assert os.fstat(parked._file).st_size == 3 * KIB


def test_a_place_that_is_free_but_too_small_is_not_used(place: Callable[..., Parking]) -> None:
    parked = place(0)
    first, second, large = random(KIB, 1), random(KIB, 2), random(3 * KIB, 3)
    parked.park(0, ((first,), {}))
    parked.park(1, ((second,), {}))
    parked.fetch(0)
    parked.park(2, ((large,), {}))
    parked.fetch(1)
    parked.fetch(2)
    assert torch.equal(second, random(KIB, 2))
    assert torch.equal(large, random(3 * KIB, 3))


def test_the_file_has_no_name_and_goes(tmp_path: Path) -> None:
    before = open_files()
    parked = Parking(limit=0, folder=tmp_path)
    parked.begin(())
    assert open_files() == before
    tensor = random()
    parked.park(0, ((tensor,), {}))
    assert open_files() == before + 1
    assert list(tmp_path.iterdir()) == []
    parked.close()
    assert open_files() == before
    parked.close()
    assert not is_away(tensor), "somebody still holds it"
    assert torch.equal(tensor, random())


def test_it_can_be_used_again(place: Callable[..., Parking]) -> None:
    parked = place(0)
    for turn in range(3):
        tensors = [random(KIB, turn), random(3 * KIB, 7)]
        parked.begin(())
        parked.park(0, (tensors, {}))
        assert is_away(tensors[0])
        if turn == 1:
            parked.fetch(0)
        parked.close()
        assert parked.resident == 0
        assert not is_away(tensors[0])
        assert torch.equal(tensors[0], random(KIB, turn))


def test_close_reads_back_only_what_is_held(place: Callable[..., Parking]) -> None:
    parked = place(0)
    held = random(KIB, 1)
    parked.park(0, ((held, random(KIB, 2)), {}))
    reads: list[int] = []
    read = parked._read
    parked._read = lambda position, target: (reads.append(position), read(position, target))[1]  # type: ignore[method-assign]
    parked.close()
    assert len(reads) == 1
    assert not is_away(held)
    assert torch.equal(held, random(KIB, 1))


def test_short_writes_and_reads_are_continued(
    place: Callable[..., Parking], monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:100], at))
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:100]], at))
    tensors, parked = [random(KIB, 1), random(KIB + 3, 2)], place(0)
    parked.park(0, (tensors, {}))
    parked.fetch(0)
    assert torch.equal(tensors[0], random(KIB, 1))
    assert torch.equal(tensors[1], random(KIB + 3, 2))


def test_a_full_disk_is_an_error_with_a_remedy(
    place: Callable[..., Parking], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pwrite = os.pwrite
    room = [2 * KIB]

    def write(fd: int, data: memoryview, at: int) -> int:
        if room[0] < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(data)
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", write)
    before, parked = open_files(), place(0)
    tensors = [random(KIB, seed) for seed in range(3)]
    with pytest.raises(OutputError, match=r"no room.*No space left on device.*fewer") as raised:
        parked.park(0, (tensors, {}))
    assert str(tmp_path) in str(raised.value)
    parked.close()
    assert open_files() == before
    assert not any(map(is_away, tensors))
    assert all(torch.equal(tensor, random(KIB, seed)) for seed, tensor in enumerate(tensors))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    parked = Parking(limit=0, folder=tmp_path / "missing")
    parked.begin(())
    with pytest.raises(OutputError, match="missing"):
        parked.park(0, ((random(),), {}))
    parked.close()


def test_a_file_that_ends_early_is_an_error(place: Callable[..., Parking]) -> None:
    parked, tensor = place(0), random()
    parked.park(0, ((tensor,), {}))
    os.ftruncate(parked._file, 10)
    with pytest.raises(OutputError, match="ended early"):
        parked.fetch(0)

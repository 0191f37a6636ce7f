# SPDX-License-Identifier: Apache-2.0
"""The window of shards: what is fetched when, what is dropped, and how errors arrive."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.errors import SourceError
from fourfold.sources.hub.window import Window


class Shards:
    """Counts what a window fetches and drops."""

    def __init__(self, most: int | None, kept: Sequence[str] = ()) -> None:
        self.fetched: Counter[str] = Counter()
        self.here: set[str] = set()
        self.peak = 0
        self.broken: set[str] = set()
        self._lock = threading.Lock()
        self.window = Window(self.fetch, self.drop)
        self.window.most, self.window.kept = most, set(kept)

    def fetch(self, shard: str) -> Path:
        with self._lock:
            if shard in self.broken:
                raise SourceError(f"{shard} is broken")
            self.fetched[shard] += 1
            self.here.add(shard)
            self.peak = max(self.peak, len(self.here - self.window.kept))
        return Path(shard)

    def drop(self, shard: str, path: Path) -> None:
        assert path == Path(shard)
        with self._lock:
            self.here.remove(shard)

    def read(self, shard: str) -> None:
        with self.window.reading(shard) as path:
            assert path == Path(shard)
            assert shard in self.here


@contextmanager
def shards(most: int | None, kept: Sequence[str] = ()) -> Iterator[Shards]:
    made = Shards(most, kept)
    yield made
    made.window.close()
    made.window.join(10)


def named(text: str) -> list[tuple[str, str]]:
    """Reads of one tensor for each letter, in the shard of that name."""
    return [(f"tensor {letter}", letter) for letter in text]


def read_all(made: Shards, reads: Sequence[tuple[str, str]]) -> None:
    for key, shard in reads:
        made.read(shard)
        made.window.done_with([key])


def test_an_order_that_follows_the_shards_fetches_each_once() -> None:
    reads = named("aabbbccddddeeffgg")
    with shards(3) as made:
        made.window.expect(reads)
        read_all(made, reads)
        assert made.fetched == Counter("abcdefg")
        assert made.peak <= 3
        assert not made.here


def test_a_shard_that_is_needed_at_both_ends_stays_or_comes_twice() -> None:
    reads = named("az" + "aabbccddeeffgg" + "z")
    with shards(3) as made:
        made.window.expect(reads)
        read_all(made, reads)
        assert made.fetched.total() <= 9
        assert made.peak <= 3


def test_all_are_kept_without_a_limit() -> None:
    reads = named("abcabc")
    with shards(None) as made:
        made.window.expect(reads)
        read_all(made, reads)
        assert made.fetched == Counter("abc")
        assert made.here == set("abc")


def test_what_is_kept_takes_no_room() -> None:
    reads = named("abcdabcd")
    with shards(1, kept="ac") as made:
        made.window.expect(reads)
        read_all(made, reads)
        assert made.here == set("ac")
        assert made.peak <= 1


def test_a_shard_that_is_read_unexpectedly_stays_until_room_is_needed() -> None:
    with shards(2) as made:
        for _ in range(3):
            made.read("x")
        assert made.fetched["x"] == 1
        for shard in "yzw":
            made.read(shard)
        assert made.peak <= 2


@settings(max_examples=60, deadline=None)
@given(st.text("abcdef", min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 4))
def test_any_order_is_read_by_any_number_of_threads(text: str, most: int, threads: int) -> None:
    """Nobody waits forever, and never do more shards lie there than may."""
    reads = named(text)
    with shards(most) as made:
        made.window.expect(reads)

        def work(item: tuple[str, str]) -> None:
            made.read(item[1])
            made.window.done_with([item[0]])

        with ThreadPoolExecutor(threads) as pool:
            for future in [pool.submit(work, item) for item in reads]:
                future.result(30)
        assert made.peak <= most
        assert not made.here


def test_an_error_is_raised_where_the_shard_is_read_and_may_pass() -> None:
    with shards(3) as made:
        made.broken.add("b")
        made.window.expect(named("ab"))
        made.read("a")
        for _ in range(2):
            with pytest.raises(SourceError, match="b is broken"):
                made.read("b")
        made.broken.clear()
        made.read("b")


def test_whoever_waits_at_the_end_fails() -> None:
    arrives = threading.Event()

    def fetch(shard: str) -> Path:
        arrives.wait(30)
        return Path(shard)

    window = Window(fetch, lambda *_: None)
    with ThreadPoolExecutor(1) as pool:

        def read() -> None:
            with window.reading("a"):
                pass

        future = pool.submit(read)
        window.close()
        with pytest.raises(SourceError, match="the run has ended"):
            future.result(30)
    arrives.set()
    window.join(30)

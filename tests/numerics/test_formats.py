# SPDX-License-Identifier: Apache-2.0
"""Proves the two formats: E2M1 rounding, packing and signs; E4M3 values, clamp and order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourfold.errors import UsageError
from fourfold.formats.nvfp4 import e2m1, e4m3

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def test_halves_go_to_the_even_code():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert e2m1.decode(e2m1.encode(x)).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert e2m1.decode(e2m1.encode(-x)).tolist() == [0, -1, -1, -2, -2, -4, -4]


def test_just_beside_a_half_the_nearest_wins():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    above, below = torch.nextafter(x, x + 1), torch.nextafter(x, x - 1)
    assert e2m1.decode(e2m1.encode(above)).tolist() == [0.5, 1, 1.5, 2, 3, 4, 6]
    assert e2m1.decode(e2m1.encode(below)).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4]


def test_every_code_round_trips_with_its_sign():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(e2m1.encode(e2m1.decode(codes)), codes)
    assert e2m1.encode(torch.tensor([-0.0, -0.1, -1e-40])).tolist() == [8, 8, 8]


@given(finite)
def test_no_value_is_nearer(x):
    chosen = float(e2m1.decode(e2m1.encode(torch.tensor(x))))
    held = max(-6.0, min(6.0, x))
    assert abs(held - chosen) == min(abs(held - float(v)) for v in e2m1.E2M1_VALUES)


@given(st.lists(st.integers(0, 15), max_size=64).filter(lambda c: len(c) % 2 == 0))
def test_packing_round_trips(codes):
    tensor = torch.tensor(codes, dtype=torch.uint8)
    assert e2m1.unpack(e2m1.pack(tensor)).tolist() == codes


def test_the_low_nibble_is_the_even_element():
    assert e2m1.pack(torch.tensor([[1, 15]], dtype=torch.uint8)).tolist() == [[0xF1]]


def test_odd_rows_cannot_be_packed():
    with pytest.raises(UsageError, match="even"):
        e2m1.pack(torch.zeros(3, dtype=torch.uint8))


def test_the_table_is_that_of_the_format():
    subnormal = [byte * 2.0**-9 for byte in range(1, 8)]
    normal = [(8 + byte % 8) * 2.0 ** (byte // 8 - 10) for byte in range(8, 127)]
    assert e4m3.E4M3_POSITIVE.tolist() == subnormal + normal
    assert e4m3.E4M3_POSITIVE[0] == e4m3.E4M3_MIN
    assert e4m3.E4M3_POSITIVE[-1] == e4m3.E4M3_MAX


@given(st.floats(0, 2.0**100, width=32))
def test_a_block_scale_is_never_zero_or_nan(x):
    byte = int(e4m3.encode_clamped(torch.tensor(x)).view(torch.uint8))
    assert 1 <= byte <= 126

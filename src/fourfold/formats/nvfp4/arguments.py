# SPDX-License-Identifier: Apache-2.0
"""Checks of scalar arguments, which callers pass as numbers or as tensors with one element."""

from __future__ import annotations

from torch import Tensor

from fourfold.errors import UsageError


def one_number(value: object, what: str) -> float:
    """Return `value`, a real number or a tensor with one element, as a float.

    Raises:
        UsageError: It is something else; the message names `what` it is for.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise UsageError(f"{what} is one number, not a tensor {list(value.shape)}")
    try:
        if not isinstance(value, str | bytes):
            return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        pass
    raise UsageError(f"{what} is a number or a tensor with one element, not {value!r:.80}")

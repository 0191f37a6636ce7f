# SPDX-License-Identifier: Apache-2.0
"""Pads in token ids that come without a mask.

The end-of-text token often serves as pad, and then its id alone does not tell pads from text. A pad
is what lies in a run, of two or more, of one such id at the beginning or the end of a row: a single
one may be where a text begins or ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def pad_ids(*settings: Mapping[str, Any]) -> frozenset[int]:
    """Return the ids that may serve as pads by configurations of a model, also nested ones."""
    ids: list[Any] = []
    for config in settings:
        for name in ("pad_token_id", "eos_token_id"):
            value = config.get(name)
            ids += value if isinstance(value, list) else [value]
        if isinstance(nested := config.get("text_config"), Mapping):
            ids += pad_ids(nested)
    return frozenset(token for token in ids if type(token) is int)


def text_mask(ids_BS: Tensor, pads: frozenset[int]) -> Tensor:
    """Return the mask [B, S], 1 for text and 0 for pads, of rows of token ids."""
    pads_P = torch.tensor(sorted(pads), dtype=ids_BS.dtype, device=ids_BS.device)
    is_pad_BS = torch.isin(ids_BS, pads_P)
    mask_BS = ~_leading_run(ids_BS, is_pad_BS)
    mask_BS &= ~_leading_run(ids_BS.flip(-1), is_pad_BS.flip(-1)).flip(-1)
    return mask_BS.to(torch.int64)


def _leading_run(ids_BS: Tensor, is_pad_BS: Tensor) -> Tensor:
    """True in the first run of each row, where it is one of pads and longer than one."""
    run_BS = ((ids_BS == ids_BS[..., :1]) & is_pad_BS).cumprod(-1)
    return run_BS.bool() & (run_BS.sum(-1, keepdim=True) > 1)

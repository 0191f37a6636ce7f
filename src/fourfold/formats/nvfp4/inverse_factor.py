# SPDX-License-Identifier: Apache-2.0
"""The factor U of an inverse, H⁻¹ = UᵀU with U upper triangular, without H⁻¹.

With its rows and columns reversed, H has a Cholesky factor; reversed back, that is H = R·Rᵀ with R
upper triangular, and U = R⁻¹. In blocks

    H = │H₁₁ H₁₂│    R = │A B│    C·Cᵀ = H₂₂   B = H₁₂·C⁻ᵀ   A·Aᵀ = H₁₁ − B·Bᵀ
        │ ·  H₂₂│        │0 C│

so that U is found from its parts, which are found likewise, and nothing but products is left:

    U₂₂ from H₂₂    B = H₁₂·U₂₂ᵀ    U₁₁ from H₁₁ − B·Bᵀ    U₁₂ = −U₁₁·B·U₂₂.

That is 2/3·I³ multiplications and additions each, if zeros are left out, as products in blocks of
columns do. LAPACK takes care of the smallest blocks. Only the upper half of H is read.

Shapes: I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAF = 64
"""Matrices up to this size are left to LAPACK."""
STEP = 128
"""Rows or columns of a product that are computed at once, to leave out zeros beside them."""


def inverse_factor(h: Tensor) -> Tensor:
    """Return U for matrices `[..., I, I]`; only single ones may be larger than `LEAF`.

    Where float32 finds H not positive definite, it is done in float64.
    """
    factor = torch.zeros_like(h)
    is_done = _fill(h.clone(), factor) if h.shape[-1] > LEAF else _fill_leaf(h, factor)
    if is_done:
        return factor
    if h.dtype == torch.float64:
        raise ArithmeticError("a damped second moment is not positive definite")
    return inverse_factor(h.double()).to(h.dtype)


def _fill(h_II: Tensor, u_II: Tensor) -> bool:
    """Fill the upper half of U, zeros elsewhere; H is changed. False if it is not positive."""
    width = len(h_II)
    if width <= LEAF:
        return _fill_leaf(h_II, u_II)
    half = max(LEAF, width // 2 // STEP * STEP)
    first, last = slice(0, half), slice(half, width)
    if not _fill(h_II[last, last], u_II[last, last]):
        return False
    b = _times_transposed(h_II[first, last], u_II[last, last])
    _subtract_square(h_II[first, first], b)
    if not _fill(h_II[first, first], u_II[first, first]):
        return False
    torch.neg(_times(_left_times(u_II[first, first], b), u_II[last, last]), out=u_II[first, last])
    return True


def _fill_leaf(h: Tensor, u: Tensor) -> bool:
    lower, info = torch.linalg.cholesky_ex(h.flip(-1, -2).mT)
    if bool(info.any()) or not bool(torch.isfinite(lower).all()):
        return False
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    u.copy_(torch.linalg.solve_triangular(lower.flip(-1, -2), eye, upper=True))
    return True


def _steps(width: int) -> list[slice]:
    return [slice(start, min(start + STEP, width)) for start in range(0, width, STEP)]


def _times_transposed(x: Tensor, u: Tensor) -> Tensor:
    """x·uᵀ, u upper triangular."""
    product = torch.empty_like(x, memory_format=torch.contiguous_format)
    for step in _steps(len(u)):
        torch.mm(x[:, step.start :], u[step, step.start :].T, out=product[:, step])
    return product


def _times(x: Tensor, u: Tensor) -> Tensor:
    """x·u, u upper triangular."""
    product = torch.empty_like(x)
    for step in _steps(len(u)):
        torch.mm(x[:, : step.stop], u[: step.stop, step], out=product[:, step])
    return product


def _left_times(u: Tensor, x: Tensor) -> Tensor:
    """u·x, u upper triangular."""
    product = torch.empty_like(x)
    for step in _steps(len(u)):
        torch.mm(u[step, step.start :], x[step.start :], out=product[step])
    return product


def _subtract_square(h: Tensor, b: Tensor) -> None:
    """Subtract b·bᵀ from the upper half of h."""
    for step in _steps(len(h)):
        h[step, step.start :].addmm_(b[step], b[step.start :].T, alpha=-1)

# SPDX-License-Identifier: Apache-2.0
"""The mse search: why about ten of the 126 block scales decide, and how rounding is kept out of it.

The definition of codes, scales and losses is the head of `reference.py`. What follows is proved
once, for the kernels of `sweep_cpu` and of `sweep_cuda`; each says in its own head what it does
its own way.

**Notation.** A block w_1 … w_16 (magnitudes), b its largest. A candidate is an E4M3 byte c, value
s_c, step m_c = fl32(s_c·S); x = w/m_c; q the code's value; D(x) the distance from x to the grid
0 ½ 1 1½ 2 3 4 6. L(c) is the loss by definition. fl is rounding to float32, u = 2⁻²⁴. S ≥ 2⁻¹¹⁷, so
m_c is normal, and where bytes c and h have s_c = 2·s_h, m_c = 2·m_h exactly.

**1. Above: half a scale is better unless it clips.** Let s_c = 2·s_h and fl(b/m_h) < 7. Then
L(h) ≤ L(c), in the definition's own arithmetic; h being the smaller byte, c cannot win.
  Take one element; v = fl(w/m_h) < 7, and fl(w/m_c) = v/2 (halving is exact; where it underflows
  both codes are 0). The code under c has a value q ≤ 3 (4 needs v/2 ≥ 3½), and 2q ≤ 6 is in the
  grid too: (m_c, q) and (m_h, 2q) are the same number. (i) v is no halfway point of the grid. As
  halfway points are float32 numbers and fl is monotone, v lies on the same side of each as w/m_h
  does, so the code under h is the grid value nearest to w/m_h (for 6 < v < 7 it is 6, and 2q = 6
  as well), and its |d| is not above that of 2q. (ii) v is a halfway point ¼ ¾ 1¼ 1¾ 2½ 3½ 5. Half
  to even gives 0 1 1 2 2 4 4 under h; under c, v/2 gives 0 ½ ½ 1 1 2 2: the same number.
  So |d| is, element by element, not larger under h. Float64 rounding of d, of d·d and of the
  sum are monotone and the order is the same, hence L(h) ≤ L(c).
Half of byte c is c − 8 for c ≥ 16, and c/2 for even c < 16; odd bytes below 16 have none. So with
a = FIRST any byte with fl(b/m_a) < 7, every c > max(a, 8) + 7 is out: c − 8 ≥ max(a, 8). What is
left from a upwards is a … LAST = min(max(a, 8) + 7, 126): eight candidates, or up to 15 where
scales are subnormal (a < 8) and halves may be missing. The kernels take the least a with
b ≤ 6.99·m_a (or the next, below 8); the 0.01 is far more than their rounding.

**2. Below: clipping alone loses.** For c < a, b > 6·m_c, so L(c) ≥ (b − 6·m_c)², which grows as c
falls. Once it exceeds the best loss found (by more than the error bound of 4), neither c nor
anything below it can win. This bound needs no case for subnormal scales, nor for blocks beyond the
top of the range (b > 6.99·448·S: nothing lies above, all candidates are clipped ones).

**3. Nothing to choose.** If b ≤ ¼·m_1, all codes are 0 under every scale, all losses are equal, and
byte 1 wins.

**4. Fast losses, and when they decide.** The search evaluates in float32, with y = w·2^k and
S·2^k in [1, 2) (exact, but for weights 2⁻¹²⁶ below S, which are 0 to every candidate), an inverse r
of m, and products that may or may not fuse into sums:
    x̂ = y·r    q̂ by splitting (below)    Λ = m²·Σ(x̂ − q̂)²
Let |x̂ − x| ≤ ρu·x: ρ = 2.01 for a correctly rounded r and product. D is 1-Lipschitz; the
definition's code is that of fl(w/m), so its |d|/m is at most D(x) + 2u·x. Hence
| |x̂ − q̂| − |d|/m | ≤ δu·x with δ = ρ + 3.2, rounding of the difference included (D ≤ x).
By Cauchy, with E = Σy²:   |Λ − L| ≤ 2δu·√(E·Λ) + δ²u²·E + 14u·Λ   (the last term: squares, nine
additions, m², product). Let L(c) ≤ L(c*) where c* has the least Λ. Solving the quadratic in √Λ(c):
    √Λ(c) ≤ √Λ(c*)·(1 + 24u) + 4.2δu·√E
REACH is the square of the right side or something above it. If the second best Λ lies above it, c*
is the answer. If not (about one block in 5,000), all candidates that 1-3 left are compared by the
definition: the block is **settled**. Fused or not, one vector width or another, Λ stays within the
bound, and the bytes are the same on every machine. Should a weight be so large that float32 could
overflow (y > 2⁴⁰), the sums become infinite and the caller turns to the reference.

**5. Rounding by splitting.** For x ≥ 1 a grid value has two significant bits, and Veltkamp's split
finds it: c = x·(2²² + 1), q = c − (c − x); c − x ≈ 2²²·x is a float32 whose last bit is worth ½, 1
or 2 as x is below 2, 4 or 8. Below 1 the spacing stays ½: c = max(c, 2²² + 1). A c that is off by
a few units in its last place changes the spacing only next to 1, 2 or 4, which lie on both grids.
Halves may go either way, and do not matter: both ways lose the same. Codes are not taken from here,
but from fl32(w/m), correctly rounded, once for the winner.
"""

from __future__ import annotations

import torch

MAX, MSE, MSE_FULL = 0, 1, 2
"""How a kernel chooses scales: by max, by the search, or by the search without parts 1-3."""

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
KINDS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}
"""How a kernel is told the dtype of a weight."""

SPLIT = 2.0**22 + 1
"""The factor of part 5."""

EDGE = 1 / 6.99
"""FIRST is the least byte whose step is not below b times this (part 1)."""

FAR = 2.0**40
"""Weights beyond it, in units of about the global scale, are not for float32 (part 4)."""

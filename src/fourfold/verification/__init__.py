# SPDX-License-Identifier: Apache-2.0
"""Read back a quantized checkpoint and prove it tensor by tensor.

This package does not depend on how the checkpoint was made: it imports nothing from `planning`,
`execution` or `layouts`. It shares with the writer the inventory of a model, the engines' rules on
ignore lists, and the dequantizing kernels. docs/verify.md says which mistakes it therefore misses.
"""

from fourfold.errors import UnreadableError
from fourfold.verification.compare import LinearError
from fourfold.verification.report import Counts, Report, RoleError
from fourfold.verification.rules import RULES, Finding, Rule, Severity
from fourfold.verification.verifier import verify

__all__ = [
    "RULES",
    "Counts",
    "Finding",
    "LinearError",
    "Report",
    "RoleError",
    "Rule",
    "Severity",
    "UnreadableError",
    "verify",
]

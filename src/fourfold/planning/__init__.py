# SPDX-License-Identifier: Apache-2.0
"""Recipe × inventory → plan: one explicit row for each tensor of the source."""

from fourfold.formats.base import Spec
from fourfold.formats.scheme import Scheme
from fourfold.planning.copy_plan import CopyPlan
from fourfold.planning.exact_casts import mxfp4_scale
from fourfold.planning.limits import DEFAULT_LIMITS, Limits
from fourfold.planning.plan import Plan, make_plan
from fourfold.planning.rows import (
    Action,
    Job,
    KVScales,
    Row,
    ScaleGroup,
    Shard,
    is_fp8,
    is_mxfp4,
    job_bytes,
    keeps_codes,
    keys_of,
    slabs_of,
)
from fourfold.planning.shards import cut, deal, lay_out, outputs_of, shard_names

__all__ = [
    "DEFAULT_LIMITS",
    "Action",
    "CopyPlan",
    "Job",
    "KVScales",
    "Limits",
    "Plan",
    "Row",
    "ScaleGroup",
    "Scheme",
    "Shard",
    "Spec",
    "cut",
    "deal",
    "is_fp8",
    "is_mxfp4",
    "job_bytes",
    "keeps_codes",
    "keys_of",
    "lay_out",
    "make_plan",
    "mxfp4_scale",
    "outputs_of",
    "shard_names",
    "slabs_of",
]

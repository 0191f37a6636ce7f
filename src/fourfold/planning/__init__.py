"""Recipe × inventory: one explicit row for each tensor of the source."""

from fourfold.planning.plan import Plan, make_plan
from fourfold.planning.rows import (
    COPY_BYTES,
    GROUP_BYTES,
    WAITING,
    Action,
    Job,
    KVScales,
    Row,
    ScaleGroup,
    Shard,
    is_plain,
    job_bytes,
    raw_keys,
    slabs_of,
)
from fourfold.planning.shards import Spec, cut, deal, lay_out, outputs_of, shard_names

__all__ = [
    "COPY_BYTES",
    "GROUP_BYTES",
    "WAITING",
    "Action",
    "Job",
    "KVScales",
    "Plan",
    "Row",
    "ScaleGroup",
    "Shard",
    "Spec",
    "cut",
    "deal",
    "is_plain",
    "job_bytes",
    "lay_out",
    "make_plan",
    "outputs_of",
    "raw_keys",
    "shard_names",
    "slabs_of",
]

# SPDX-License-Identifier: Apache-2.0
"""The documents that `--json` prints and `to_dict` returns, as models: `fourfold schema` has their
JSON Schema, and docs/json.md says what they are for.

Every document says what it is (`kind`) and which version of these models it follows. A later
version may add keys; `schema_version` is raised if one is removed or means something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Document(_Part):
    """One JSON document."""

    schema_version: Literal[1] = 1


# --- plan ---------------------------------------------------------------------------------------


class PlannedTensor(_Part):
    """The plan's treatment of one tensor of the source."""

    name: str
    role: str
    action: str
    """quantize, copy, or split (copied in parts)."""
    reason: str
    bytes_before: int
    bytes_after: int
    linear_weights: int
    """Linear weights that are quantized in it."""


class PlannedShard(_Part):
    """A file that will be written."""

    file: str
    unit: str
    """The part of the model that it holds."""
    tensors: int
    bytes: int


class TimeEntry(_Part):
    """An estimate of the time, from the speed of this machine."""

    seconds: float
    threads: int
    weights_per_second: int | None
    bytes_per_second: int | None
    calibration_seconds: float | None
    budget_seconds: float | None
    """The time to measure what a budget is spent on; None if there is none, or not measured."""
    without_calibration: bool
    """True if calibration, which no estimate covers, comes on top."""
    without_fetching: bool
    """True if fetching a model from the hub, which no estimate covers, comes on top."""


class PlanDocument(Document):
    """The plan of a run: `fourfold plan --json`, `Plan.to_dict()`."""

    kind: Literal["plan"] = "plan"
    source: str
    architecture: str
    model_types: list[str]
    recipe: dict[str, Any]
    bytes_before: int
    bytes_after: int
    memory_bytes: int
    linear_weights: int
    tensor_parallel: dict[str, str]
    """By tensor-parallel size, "loads", or why it does not."""
    notes: list[str]
    side_files: list[str]
    dropped_files: dict[str, str]
    """Files of the source that are not copied, and why."""
    quantization_config: dict[str, Any]
    """The entry of the output's config.json."""
    tensors: list[PlannedTensor]
    shards: list[PlannedShard]
    time: TimeEntry | None = None
    """None without --time."""


# --- verify -------------------------------------------------------------------------------------


class FindingEntry(_Part):
    """A breach of a rule of `verify`."""

    severity: Literal["error", "warning"]
    id: str
    """The rule. Rules keep their ids."""
    tensor: str
    """A tensor, a linear, a module or a file."""
    found: str
    effect: str
    """The effect on engines."""


class CountsEntry(_Part):
    """The amounts that were verified."""

    tensors: int
    quantized_linears: int
    quantized_weights: int
    """Numbers in the quantized linears."""
    unquantized_linears: int
    block_scales: int
    zero_block_scales: int
    nan_block_scales: int
    negative_block_scales: int
    subnormal_block_scales: int
    input_scales: int
    kv_scales: int
    copied_tensors: int
    """Compared with the source, bit for bit."""
    compared_linears: int
    """Dequantized and compared with the source."""
    bytes_read: int


class RoleErrorEntry(_Part):
    """The relative errors of all linears of a role. None stands for a number that is not finite."""

    role: str
    linears: int
    relative_error: float | None
    sqnr_db: float | None
    largest: float | None


class RelativeErrorEntry(_Part):
    """The relative error of a quantized linear. None stands for a number that is not finite."""

    name: str
    role: str
    relative_error: float | None
    """‖W − Ŵ‖ / ‖W‖."""
    sqnr_db: float | None


class VerificationDocument(Document):
    """The result of `fourfold verify --json`, `Report.to_dict()`."""

    kind: Literal["verification"] = "verification"
    folder: str
    source: str | None
    quant_algo: str | None
    clean: bool
    """True if `errors` is empty."""
    counts: CountsEntry
    findings: list[FindingEntry]
    """`errors`, then `warnings`."""
    errors: list[FindingEntry]
    warnings: list[FindingEntry]
    roles: list[RoleErrorEntry]
    reference: str | None = None
    """The checkpoint that a quantized source was made from, if it was given."""
    reference_roles: list[RoleErrorEntry] = []
    """The errors against it."""
    worst: list[str]
    """The linears with the largest relative errors, at most ten."""
    relative_errors: list[RelativeErrorEntry]
    """One for each quantized linear; empty without a source."""


# --- quantize, merge, convert -------------------------------------------------------------------


class CalibrationDataEntry(_Part):
    """The data that activations were observed on."""

    origin: str
    digest: str
    """SHA-256 of the token ids."""
    samples: int
    seq: int
    """Tokens of the longest sample."""
    tokens: int
    all_experts: bool


class NonFiniteEntry(_Part):
    """The NaN and Inf in a tensor that is copied."""

    name: str
    values: int
    rows: int
    """Rows that hold some."""
    first_row: int
    last_row: int


class DemoComparison(_Part):
    """The embedded model after quantization beside the one before it."""

    kl: float
    top1_agreement: float
    reference_bits: float
    quantized_bits: float
    positions: int


class DemoEntry(_Part):
    """The quantized model's result in `fourfold demo`."""

    prompt: str
    reference_text: str
    quantized_text: str
    comparison: DemoComparison
    simulated: bool
    temperature: float


class QuantizationDocument(Document):
    """The result of `fourfold quantize --json` and `demo --json`, `Result.to_dict()`."""

    kind: Literal["quantization"] = "quantization"
    out: str
    recipe: str
    linear_weights_planned: int
    linear_weights_quantized: int
    bytes_before: int
    bytes_after: int
    calibration: CalibrationDataEntry | None
    unreached_experts: dict[str, list[int]]
    """By experts module, the experts that no calibration token was routed to."""
    repairs: dict[str, str]
    """By linear weight, what was repaired."""
    non_finite: list[NonFiniteEntry]
    """Copied tensors that hold NaN or Inf, as they do in the source."""
    decoded_from: dict[str, int]
    """By quantized form of the source, how many tensors were decoded from it."""
    exact_casts: int
    """How many linear weights have the source's own codes."""
    kernels: str
    warnings: list[str]
    seconds: float
    peak_resident_bytes: int
    verification: VerificationDocument | None
    """None if it was not asked for, or if OUT is a part for `merge`."""
    preview: GenerationDocument | None = None
    """The continuations by source and OUT; None if there are none."""
    demo: DemoEntry | None = None
    """Of `fourfold demo` alone."""


class MergeDocument(Document):
    """The result of `fourfold merge --json`, `Merged.to_dict()`."""

    kind: Literal["merge"] = "merge"
    out: str
    folders: int
    shards_before: int
    shards: int
    bytes: int
    verification: VerificationDocument | None


class ConversionDocument(Document):
    """The result of `fourfold convert --json`, `Converted.to_dict()`."""

    kind: Literal["conversion"] = "conversion"
    out: str
    tensors: int
    shards: int
    bytes: int
    seconds: float
    notes: list[str]


# --- inspect, generate, recipes -----------------------------------------------------------------


class TensorKindEntry(_Part):
    """Tensors of one dtype and shape whose names differ only in numbers."""

    pattern: str
    dtype: str
    shape: list[int]
    count: int
    nbytes: int
    scales: list[float] | None
    """Smallest and largest value, for scalar float32 scales."""


class InspectionDocument(Document):
    """The result of `fourfold inspect --json`."""

    kind: Literal["inspection"] = "inspection"
    folder: str
    model_type: str
    quantization: str | None
    ignored: int
    """Entries of the ignore list."""
    files: int
    tensors: int
    nbytes: int
    kinds: list[TensorKindEntry]


class ContinuationEntry(_Part):
    """The continuation of the prompt by one model."""

    model: str
    text: str
    tokens: list[int]
    streamed: bool
    """True if its layers were loaded one at a time."""
    seconds: float


class GenerationDocument(Document):
    """The result of `fourfold generate --json`, `Generation.to_dict()`."""

    kind: Literal["generation"] = "generation"
    prompt: str
    source: ContinuationEntry | None
    quantized: ContinuationEntry
    simulated: bool
    """True if the inputs of the quantized model's linear layers were rounded."""
    kv_cache: str | None = None
    """The format that its keys and values were rounded to."""
    same_tokens: int | None
    """The number of tokens that both texts begin with."""


class ModelFiguresEntry(_Part):
    """A quantized checkpoint beside its source. KL in nats a token; shares from 0 to 1."""

    model: str
    simulated: bool
    """True if the inputs of its linear layers were rounded."""
    kv_cache: str | None
    """The format that its keys and values were rounded to."""
    kl: float
    """Mean KL(source ‖ model) over all positions."""
    kl_interval: tuple[float, float] | None
    """Its 95 % interval, by a bootstrap over windows; None for a single window."""
    kl_median: float
    kl_p90: float
    kl_p99: float
    top1: float
    """Share of positions where both rank the same token first."""
    top5: float
    """Share of the source's five likeliest tokens that are among the model's five."""
    perplexity: float
    ratio: float | None
    """KL divided by that of the first checkpoint; None for the first, or if that is 0."""
    ratio_interval: tuple[float, float] | None


class EvaluationDocument(Document):
    """The result of `fourfold eval --json`, `Evaluation.to_dict()`."""

    kind: Literal["evaluation"] = "evaluation"
    source: str
    text: str
    text_digest: str
    """SHA-256 of the token ids."""
    windows: int
    length: int
    """Tokens of a window."""
    compared: int
    """How many of the source's likeliest tokens were compared one by one at each position."""
    vocabulary: int
    rest: float
    """The mean probability of all other tokens, which were compared as one."""
    perplexity: float
    """Of the source."""
    models: list[ModelFiguresEntry]
    cache: str | None
    """The file that keeps the source's predictions; None if none was kept."""
    cache_bytes: int
    from_cache: bool
    """True if an earlier run wrote it, so that the source was not run."""
    seconds: float


class OptionFiguresEntry(_Part):
    """A component of the model in one format, beside the source."""

    option: str
    """As a recipe's `budget` names it; `recipe` for what its own rules say."""
    format: str
    """For people: "NVFP4 W4A4"."""
    bits: float
    """Bits for each weight, scales included."""
    kl: float
    """Mean KL(source ‖ source with this component in this format), nats a token."""
    kl_interval: tuple[float, float] | None
    """Its 95 % interval, by a bootstrap over windows; None for a single window."""


class ComponentFiguresEntry(_Part):
    """What one component of the model costs: weights that engines fuse, or all experts of a
    layer."""

    component: str
    role: str
    layer: int
    weights: int
    options: list[OptionFiguresEntry]


class SensitivityDocument(Document):
    """The result of `fourfold sensitivity --json`, `Sensitivity.to_dict()`."""

    kind: Literal["sensitivity"] = "sensitivity"
    source: str
    recipe: str
    text: str
    text_digest: str
    """SHA-256 of the token ids."""
    windows: int
    length: int
    """Tokens of a window."""
    is_estimate: bool
    """True if fewer tokens were read because the model is large."""
    together: float
    """The KL of all components as the recipe has them, at the same time."""
    components: list[ComponentFiguresEntry]
    seconds: float


class RecipesDocument(Document):
    """The built-in recipes by name, `fourfold recipes --json`; or one of them."""

    kind: Literal["recipes"] = "recipes"
    recipes: dict[str, dict[str, Any]]


class CostEntry(_Part):
    """The measured cost of a recipe."""

    kl: float
    top1_agreement: float


class AdviceEntry(_Part):
    """The recipe for some hardware and an aim."""

    hardware: list[str]
    aim: str
    recipe: str
    why: str
    cost: CostEntry | None
    """None if it was not measured."""


class GuideDocument(Document):
    """Which recipe suits which hardware and aim, `fourfold recipes --guide --json`."""

    kind: Literal["guide"] = "guide"
    advice: list[AdviceEntry]


class ErrorDocument(Document):
    """The document that a failed command with --json prints in place of its result."""

    kind: Literal["error"] = "error"
    type: str
    """The class of the error in Python: `SourceError`, for instance."""
    message: str
    """The message, as on stderr."""
    exit_code: int
    """That of the process: 1, 2, 130 or 143."""


DOCUMENTS: Mapping[str, type[Document]] = {
    model.model_fields["kind"].default: model
    for model in (
        PlanDocument,
        QuantizationDocument,
        VerificationDocument,
        MergeDocument,
        ConversionDocument,
        InspectionDocument,
        GenerationDocument,
        EvaluationDocument,
        SensitivityDocument,
        RecipesDocument,
        GuideDocument,
        ErrorDocument,
    )
}
"""By kind."""


class Shown:
    """A result that prints as the command prints it, with a short `repr`, and as that text in a
    notebook."""

    def __repr__(self) -> str:
        first = str(self).partition("\n")[0]
        return f"<{type(self).__name__}: {first if len(first) <= 160 else first[:159] + '…'}>"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def document(kind: str, **values: Any) -> dict[str, Any]:
    """Return a document as plain data for JSON. Values that do not fit it are a defect of ours."""
    return DOCUMENTS[kind](**values).model_dump(mode="json")

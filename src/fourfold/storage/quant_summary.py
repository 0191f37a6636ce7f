# SPDX-License-Identifier: Apache-2.0
"""`quant_summary.json`: the record of a quantization run that lies beside every checkpoint.

The models below are the file's schema, for writing and for reading. Keys that they do not name are
kept, so that a later version may add some; a key that is missing takes its default, so that files
of earlier versions stay readable. Anything else that does not fit is one `SourceError` that names
the field.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fourfold.errors import SourceError
from fourfold.storage.fingerprints import reading
from fourfold.storage.json_files import why_no_folder
from fourfold.storage.names import SUMMARY

SCHEMA_VERSION = 1
"""Raised only when a reader of the present version would misunderstand the file."""


def _check_span(span: tuple[int, int, int]) -> tuple[int, int, int]:
    if not (span[0] >= 0 and span[2] > 0 and len(range(*span))):
        raise ValueError("a span needs a start, a stop beyond it and a positive step")
    return span


Count = Annotated[int, Field(ge=0)]
Shape = tuple[Count, ...]
FloatDtype = Literal["BF16", "F16", "F32"]
Span = Annotated[tuple[int, int, int], AfterValidator(_check_span)]
"""Start, stop and step of a range of rows or columns with at least one member."""


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: exactly the keys that were read or set."""
        return self.model_dump(exclude_unset=True)


class Ledger(_Entry):
    """Totals: what was planned must be what was quantized."""

    source_tensors: Count
    linear_weights_planned: Count
    linear_weights_quantized: Count
    tensors_written: Count
    bytes_before: Count
    bytes_after: Count


class RoleEntry(_Entry):
    """All tensors of one role that were treated alike."""

    role: str
    what: str
    """How they were treated (quantized, kept, dropped), and why."""
    tensors: Count
    linear_weights: Count
    numel: Count
    bytes_before: Count
    bytes_after: Count


class CalibrationEntry(_Entry):
    """The data that activations were observed on."""

    origin: str
    digest: str
    """SHA-256 of the token ids."""
    samples: Count
    seq: Count
    """Tokens of the longest sample."""
    tokens: Count
    all_experts: bool = False
    """True if every expert computed every token, routed to it or not."""
    unreached_experts: Count = 0


class KVCacheEntry(_Entry):
    """The FP8 scales of one attention module's keys and values."""

    name: str
    k_scale: float
    v_scale: float


class ShardEntry(_Entry):
    """A shard, and how many tensors each of its jobs wrote: it may be cut between jobs."""

    file: Annotated[str, Field(pattern=r"^[^/]+$")]
    unit: str
    layer: Count | None
    jobs: tuple[Count, ...]


class ExpertsEntry(_Entry):
    """The calibration tokens that were routed to each expert of one experts module."""

    module: str
    layer: Count | None
    tokens: tuple[Count, ...]


class RawTensorEntry(_Entry):
    """A tensor of the source that the checkpoint holds only in parts."""

    key: str
    dtype: FloatDtype
    shape: Shape


class RawRegion(_Entry):
    """The part of a source tensor that became a linear weight or a bias.

    `expert` indexes the tensor's first dimension; `rows` and `cols` are spans of its last two
    dimensions, or of the last one for a bias (`cols` is None). `transposed`: the source has
    [in, out] there.
    """

    key: str
    expert: Count | None
    rows: Span
    cols: Span | None
    transposed: bool


class RepairEntry(_Entry):
    """A linear weight whose scales are not what its algorithm or calibration gives."""

    name: str
    repair: str
    """"floor scales": lost beside its scale group, where it cannot matter. "input scale 1": its
    inputs were all 0 in calibration."""


class NonFiniteEntry(_Entry):
    """A copied tensor that holds NaN or Inf, as it did in the source."""

    name: str
    values: Count
    rows: Count
    """The number of rows (of the first dimension) that hold some."""
    first_row: Count
    last_row: Count


class BiasEntry(_Entry):
    """A bias that was cut out of a tensor of the source. `name` lacks the `.bias`."""

    name: str
    raw: RawRegion


class LinearEntry(_Entry):
    """One quantized linear weight. Fields on activations are None if they were not calibrated."""

    name: str
    role: str
    shape: Shape
    """[out, in]."""
    format: str = "nvfp4"
    layer: Count | None = None
    expert: Count | None = None
    global_scale: float | None
    amax: float
    input_amax: float | None = None
    input_scale: float | None = None
    tokens: Count | None = None
    """Calibration tokens that this weight saw."""
    relative_error: float
    """‖w − ŵ‖ / ‖w‖ in the Frobenius norm."""
    dtype: FloatDtype | None = None
    """The weight's dtype in the source."""
    exact: bool = False
    """True if the codes are those of the source, which is quantized. Written only if it is."""
    asymmetric: float | None = None
    """The part of the change of its inputs that the weight makes up for. Written only where layers
    were quantized on what quantized layers compute."""
    asymmetric_gain: float | None = None
    """The part of the squared change of its inputs that this takes away on held-out texts. Written
    only where `asymmetric: auto` found one above 0."""
    damping: float | None = None
    """The damping of its inputs' second moment. Written only where it had to be more than the
    recipe's, because the weight would have lost more than 30 % of itself."""
    raw: RawRegion | None = None
    """The weight's place in the source; None if it was a tensor of its own."""


class DecodedEntry(_Entry):
    """A quantized form that tensors of the source had. Errors are against the decoded values."""

    form: str
    tensors: Count


class FoldEntry(_Entry):
    """What was decided about factors of a norm, or of the ups of a layer's experts.

    Factors are rms(x)^a / ‖W column‖^b, rounded to powers of two.
    """

    name: str
    """The norm, or the input site of the downs."""
    layer: Count
    kind: str
    """"norm" or "up"."""
    a: float
    b: float
    loss_before: float
    """The relative squared error of the readers' outputs on held-out rows, without factors."""
    loss_after: float
    """The same with them."""
    folds: Count
    """The number of activations with factors: 1 for a norm, else of experts."""
    exact: bool
    """False if the folded layer computed something else than the source's."""
    kept: bool
    """True if the factors are used."""


class FoldsEntry(_Entry):
    """The factors that were folded into the source before it was quantized."""

    digest: str
    """SHA-256 of the file that holds them."""
    choices: tuple[FoldEntry, ...]

    @property
    def kept(self) -> int:
        """The number of choices whose factors are used."""
        return sum(choice.kept for choice in self.choices)


class EvaluationEntry(_Entry):
    """The checkpoint beside its source on a text, as `fourfold eval --record` measured it.

    KL in nats a token; shares from 0 to 1.
    """

    source: str
    """The name of its folder, or on the hub."""
    text: str
    """The name of the file or dataset."""
    text_digest: str
    """SHA-256 of the token ids."""
    windows: Count
    length: Count
    """Tokens of a window."""
    compared: Count
    """How many of the source's likeliest tokens were compared one by one at each position."""
    vocabulary: Count
    rest: float
    """The mean probability of all other tokens, which were compared as one."""
    source_perplexity: float
    simulated: bool
    """True if the inputs of linear layers were rounded."""
    kv_cache: str | None
    """The format that keys and values were rounded to."""
    kl: float
    kl_interval: tuple[float, float] | None
    """95 %, by a bootstrap over windows; None for a single window."""
    kl_median: float
    kl_p90: float
    kl_p99: float
    top1: float
    top5: float
    perplexity: float


class BudgetStep(_Entry):
    """A point of the curve that a budget was spent along."""

    moved: dict[str, str]
    """The components that have another option than in the step before, by name."""
    bits: float
    """Bits for each weight of all components."""
    kl: float
    """On the text that the choice was made on, nats a token."""
    other_kl: float
    """On other calibration text."""


class BudgetComponent(_Entry):
    """Weights that are stored in one format."""

    name: str
    role: str
    layer: Count
    weights: Count
    option: str
    """As the recipe's `budget` names it; `recipe` for what its rules say."""
    format: str
    """For people: "NVFP4 W4A4"."""
    kl: dict[str, float]
    """By option, the KL of the whole model with this component alone changed, all others as the
    rules say: what the first choice was made by."""


class BudgetEntry(_Entry):
    """What a recipe's budget was spent on."""

    recipe: dict[str, Any]
    """The recipe as it was given; `recipe` of the summary has a rule for every component that
    moved."""
    text: str
    """The names of the files or datasets."""
    tokens: Count
    """Tokens of the text that the choice was made on."""
    other_tokens: Count
    curve: tuple[BudgetStep, ...]
    """From the recipe's own rules on."""
    components: tuple[BudgetComponent, ...]


class QuantSummary(_Entry):
    """The contents of `quant_summary.json`, its keys in the order in which they are written."""

    producer: str = "fourfold"
    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    versions: dict[str, str] = {}
    model: str = ""
    recipe: dict[str, Any]
    model_type: str
    architecture: str
    ledger: Ledger
    roles: tuple[RoleEntry, ...] = ()
    calibration: CalibrationEntry | None = None
    kv_cache: tuple[KVCacheEntry, ...] = ()
    repairs: tuple[RepairEntry, ...] = ()
    non_finite: tuple[NonFiniteEntry, ...] = ()
    decoded_from: tuple[DecodedEntry, ...] = ()
    """These three are written only if there are any."""
    budget: BudgetEntry | None = None
    """Written only if the recipe has a budget."""
    folds: FoldsEntry | None = None
    """Written only if the recipe folds."""
    evaluation: EvaluationEntry | None = None
    """Written by `fourfold eval --record`."""
    files: tuple[str, ...] = ()
    """Every file of the checkpoint."""
    shards: tuple[ShardEntry, ...] = ()
    experts: tuple[ExpertsEntry, ...] = ()
    raw_tensors: tuple[RawTensorEntry, ...] = ()
    biases: tuple[BiasEntry, ...] = ()
    linears: tuple[LinearEntry, ...]
    """Sorted by name."""

    @property
    def title(self) -> str:
        """The model's name, or else its architecture."""
        return self.model or self.architecture

    @property
    def recipe_name(self) -> str:
        """The recipe's name."""
        return str(self.recipe.get("name", "recipe"))

    @property
    def exact_casts(self) -> int:
        """The number of linear weights that were cast without loss."""
        return sum(linear.exact for linear in self.linears)

    def __repr__(self) -> str:
        return f"<QuantSummary: {self.title}, recipe {self.recipe_name}>"

    def to_json(self) -> str:
        """Return the file's text. The same summary gives the same bytes.

        Long lists have one entry a line, so that the file can be searched line by line.
        """
        document = self.to_dict()
        lists = {name: document.pop(name, ()) for name in _ONE_ENTRY_A_LINE}
        head = json.dumps(document, indent=2, ensure_ascii=False).removesuffix("\n}")
        return head + "".join(_lines(name, entries) for name, entries in lists.items()) + "}\n"


_ONE_ENTRY_A_LINE = ("shards", "experts", "raw_tensors", "biases", "linears")


def _lines(name: str, entries: Sequence[dict[str, Any]]) -> str:
    lines = ",\n".join(map(json.dumps, entries))
    return f',\n  "{name}": [\n{lines}\n]' if lines else f',\n  "{name}": []'


def read_summary(folder: str | Path) -> QuantSummary:
    """Read the summary of the checkpoint in `folder`.

    Raises:
        SourceError: If there is no folder, no summary, or one that does not fit the schema.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        problem = why_no_folder(folder)
        raise SourceError(f"{folder}: {problem}. Give the folder that `fourfold quantize` wrote.")
    summary = find_summary(folder)
    if summary is None:
        raise SourceError(
            f"{folder}: no {SUMMARY}, which `fourfold quantize` writes. Other checkpoints can be "
            "examined with `fourfold inspect` and `fourfold verify`."
        )
    return summary


def find_summary(folder: Path) -> QuantSummary | None:
    """Like `read_summary`, but None if the folder has no summary."""
    file = folder / SUMMARY
    if not file.is_file():
        return None
    try:
        with reading(file):
            return QuantSummary.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise SourceError(f"{file}: {_first_problem(error)}. Quantize the model again.") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(map(str, problem["loc"]))
    return f"{field}: {problem['msg']}" if field else problem["msg"]

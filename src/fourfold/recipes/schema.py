# SPDX-License-Identifier: Apache-2.0
"""Recipes: which linear weights are quantized, and how. Short YAML, checked when it is read.

    description: NVFP4 W4A16 for routed experts, MSE-chosen block scales
    weights:     {format: nvfp4, scale: mse}   # scale: max | mse | …; scale_group: expert | layer
    activations: none                          # W4A16; or {format: nvfp4, amax: max} (W4A4);
                                               # amax: max | constant | histogram | {headroom: 2}
    kv_cache:    none                          # or {format: fp8, scale: cast | calibrated},
                                               # or {format: nvfp4}
    calibration: {all_experts: false}          # true: every expert sees every token
    folds:       none                          # or {smooth: auto}
    quantize:    [experts]                     # roles that the model must have
    quantize_if_present: [shared_experts]      # roles that it may lack
    keep:        ["*.layers.0.*"]              # name patterns that stay as they are
    budget:      {bits_per_weight: 4.8}        # or {max_kl: 0.01}: store what costs most otherwise

These keys give one scheme to everything that is quantized. `rules` replaces `weights`,
`activations`, `quantize`, `quantize_if_present` and `keep` by a list, of which the first rule that
matches a linear weight decides; a weight that no rule matches stays as it is:

    rules:
      - {names: ["*.layers.0.*"], keep: true}
      - {roles: [experts], weights: {format: nvfp4, scale: mse}}
      - {roles_if_present: [shared_experts, mlp], weights: {format: nvfp4, scale: max}}

Every role under `quantize` or `roles`, every pattern and every rule must match something in the
model, or the run does not begin.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from fourfold.algorithms.base import ALGORITHMS, algorithm_of, fields_of
from fourfold.errors import RecipeError
from fourfold.formats.base import FORMATS
from fourfold.formats.kv_cache import KVFormat
from fourfold.formats.scheme import InputAmax, Scheme
from fourfold.layouts.base import LAYOUTS
from fourfold.recipes.budget import Budget
from fourfold.recipes.foreign import Translation, translate, translate_name

DEFAULT_RECIPE = "w4a16_nvfp4_experts_only_mse"
DEFAULT_LAYOUT = "modelopt"

QUANTIZABLE_ROLES = (
    "experts", "shared_experts", "mlp", "attention", "linear_attention", "lm_head", "mtp",
)  # fmt: skip
"""Roles that a recipe may quantize. Routers, embeddings, vision towers and norms never are."""

ROLES_WITH_EXPERTS = frozenset({"experts", "mtp"})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _known(names: Collection[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"{name!r} is not known{_nearest(name, names)}")
        return name

    return AfterValidator(check)


def _check_roles(value: tuple[str, ...]) -> tuple[str, ...]:
    for role in value:
        if role not in QUANTIZABLE_ROLES:
            raise ValueError(
                f"role {role!r} cannot be quantized{_nearest(role, QUANTIZABLE_ROLES)}"
            )
    return value


FormatName = Annotated[str, _known(FORMATS)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
"""A list in YAML."""
Roles = Annotated[Names, AfterValidator(_check_roles)]


class Weights(_Strict):
    """The format of weights, and the algorithm that chooses their scales and codes."""

    format: FormatName = "nvfp4"
    scale: Annotated[str, _known(ALGORITHMS)] = "mse"
    scale_group: Literal["expert", "layer"] = "expert"
    """Which routed experts' weights share a group scale: the gate and up of each expert, or the
    gates and ups of all experts of a layer (and likewise their downs)."""
    descent: Annotated[int, Field(ge=0, le=16)] | None = None
    """Sweeps in which codes and scales are chosen again, each given all others."""
    range: Literal[256, 448] | None = None
    """The block scale of the largest block, which the group scale leaves room for."""
    pooled: bool | None = None
    """Whether all experts of a module share one second moment of the inputs of gate and up; by
    default where moments of their own would take much memory."""
    damping: Annotated[float, Field(ge=0.001, le=10)] | None = None
    """The part of its mean diagonal that is added to a second moment."""

    @model_validator(mode="after")
    def _check(self) -> Weights:
        if self.options:
            known = fields_of(ALGORITHMS[self.scale])
            for name, _ in self.options:
                if name not in known:
                    raise ValueError(f"{name} has no effect with scale: {self.scale}; remove it")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        return {key: value for key, value in data.items() if value is not None}

    @property
    def options(self) -> tuple[tuple[str, float], ...]:
        """The algorithm's settings that are given."""
        values = {name: getattr(self, name) for name in ("descent", "range", "pooled", "damping")}
        return tuple((name, value) for name, value in values.items() if value is not None)


class Headroom(_Strict):
    """Room above the largest activation that calibration saw: its amax times 2^headroom."""

    headroom: int = Field(ge=0, le=6)


class Activations(_Strict):
    """The rounding that engines apply to the inputs of quantized layers (W4A4)."""

    format: FormatName = "nvfp4"
    amax: InputAmax | Headroom = "max"
    """The largest input that the inputs' scale holds: the largest that calibration saw (`max`,
    or times 2^headroom), one that follows the distribution that it saw (`histogram`), or the one
    that a scale of 1 stands for, without calibration (`constant`)."""

    @model_validator(mode="after")
    def _check(self) -> Activations:
        fmt = FORMATS[self.format]
        if self.amax == "max" or not fmt.rounds_activations:
            return self
        if not fmt.input_parts():
            raise ValueError(f"amax has no effect on {fmt.name} inputs: engines choose all scales")
        if self.amax == "histogram" and fmt.input_block is None:
            raise ValueError(f"amax: histogram is of block scales, which {fmt.name} inputs lack")
        return self

    @property
    def origin(self) -> InputAmax:
        """Where the largest input comes from."""
        return "max" if isinstance(self.amax, Headroom) else self.amax

    @property
    def headroom(self) -> int:
        """The inputs' scale leaves room for 2^headroom times the largest input."""
        return self.amax.headroom if isinstance(self.amax, Headroom) else 0


class KVCache(_Strict):
    """The format in which engines store keys and values.

    `cast` needs no calibration: all scales are 1.
    """

    format: KVFormat = "fp8"
    scale: Literal["cast", "calibrated"] = "cast"

    @model_validator(mode="after")
    def _check(self) -> KVCache:
        if self.format != "fp8" and self.scale != "cast":
            raise ValueError(
                f"scale: {self.scale} is for an FP8 KV cache; engines disagree about the scale of "
                f"{self.format} keys and values, so leave it 1 (scale: cast)"
            )
        return self


class Folds(_Strict):
    """Changes of the model that leave what it computes as it is, before it is quantized."""

    smooth: Literal["auto"]
    """Move factors per channel from activations into the weights that read them: `auto` chooses
    them on calibration data, and keeps those that lower the error on other data."""


class Calibration(_Strict):
    """The settings for observing activations."""

    all_experts: bool = False
    """Show every token to every expert, for statistics; the output stays the routed one."""
    propagate: Literal["source", "quantized"] = "source"
    """What each layer reads: what the layers of the source compute, or the quantized ones."""
    asymmetric: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = 0.0
    """The part of the change of a weight's inputs that its codes make up for; `auto`: what
    held-out batches of the calibration data confirm."""

    @model_validator(mode="after")
    def _check(self) -> Calibration:
        if self.asymmetric and self.propagate == "source":
            raise ValueError(
                "asymmetric has no effect without propagate: quantized; inputs do not change"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        unused = () if self.propagate == "quantized" else ("propagate", "asymmetric")
        return {key: value for key, value in data.items() if key not in unused}

    @property
    def streams(self) -> int:
        """How often each text runs through the model."""
        return 2 if self.propagate == "quantized" else 1


def _check_scale_group(weights: Weights, roles: frozenset[str]) -> None:
    if weights.scale_group == "layer" and roles and not roles & ROLES_WITH_EXPERTS:
        raise ValueError("weights.scale_group: layer is of routed experts: quantize experts")


class Rule(_Strict):
    """Which linear weights a rule is for, and what it does with them.

    A weight matches if it has one of the roles (where any are given) and its name matches one of
    the patterns (where any are given).
    """

    roles: Roles = ()
    """Roles that the model must have."""
    roles_if_present: Roles = ()
    """Roles that it may lack."""
    names: Names = ()
    """Shell patterns over the names of linear weights in the output."""
    keep: bool = False
    """The weights stay as they are."""
    weights: Weights = Weights()
    activations: Literal["none"] | Activations = "none"

    @model_validator(mode="after")
    def _check(self) -> Rule:
        if not (self.all_roles or self.names):
            raise ValueError("matches nothing: give roles, roles_if_present or names")
        idle = sorted({"weights", "activations"} & self.model_fields_set)
        if self.keep and idle:
            raise ValueError(f"keep: true leaves nothing for {idle[0]} to do; remove one of them")
        _check_scale_group(self.weights, self.all_roles)
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        unused = ("weights", "activations") if self.keep else ("keep",)
        return {
            key: value for key, value in data.items() if key not in unused and value not in ([], ())
        }

    @property
    def all_roles(self) -> frozenset[str]:
        return frozenset(self.roles) | frozenset(self.roles_if_present)

    @property
    def scheme(self) -> Scheme:
        """The scheme of the weights that the rule quantizes."""
        weights, activations = self.weights, self.activations
        if activations == "none":
            return Scheme(weights.format, weights.scale, options=weights.options)
        return Scheme(
            weights.format,
            weights.scale,
            activations.format,
            activations.headroom,
            activations.origin,
            weights.options,
        )

    @property
    def observes_inputs(self) -> bool:
        """True if calibration must measure the inputs of the weights that the rule quantizes."""
        scheme = self.scheme
        return not self.keep and (scheme.observes_inputs or bool(algorithm_of(scheme).needs))


_RULE_KEYS = ("weights", "activations", "quantize", "quantize_if_present", "keep")
"""Keys of a recipe that `rules` replaces."""


class Recipe(_Strict):
    """A recipe: how to quantize a model. `name` is that of the file or of the built-in recipe."""

    name: str = "recipe"
    description: str = ""
    weights: Weights = Weights()
    activations: Literal["none"] | Activations = "none"
    kv_cache: Literal["none"] | KVCache = "none"
    calibration: Calibration = Calibration()
    folds: Literal["none"] | Folds = "none"
    quantize: Roles = ()
    quantize_if_present: Roles = ()
    keep: Names = ()
    rules: Annotated[tuple[Rule, ...], Field(strict=False)] = ()
    layout: Annotated[str, _known(LAYOUTS)] = DEFAULT_LAYOUT
    budget: Budget | None = None
    """Components that are stored otherwise than the rules say, by what they cost."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        beside = [key for key in _RULE_KEYS if key in self.model_fields_set]
        if self.rules and beside:
            raise ValueError(f"{beside[0]} has no effect beside rules; move it into a rule")
        if not self.rules and not (self.quantize or self.quantize_if_present):
            raise ValueError("name at least one role under quantize")
        if self.rules and all(rule.keep for rule in self.rules):
            raise ValueError("rules: all of them keep; add a rule that quantizes")
        if LAYOUTS[self.layout].only_converts:
            raise ValueError(
                f"layout: {self.layout} is made of a finished checkpoint. Leave layout out here, "
                f"and run `fourfold convert` with `layout={self.layout}` then"
            )
        _check_scale_group(self.weights, frozenset((*self.quantize, *self.quantize_if_present)))
        if self.calibration.propagate == "quantized" and not self._reads_inputs:
            raise ValueError(
                "calibration.propagate: quantized has no effect on algorithms that do not look at "
                "inputs; choose another scale under weights, such as gptq_joint"
            )
        if self.calibration.all_experts and not self.observes_inputs:
            raise ValueError(
                "calibration.all_experts: only where activations are quantized and calibrated"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_the_other_form(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        unused = _RULE_KEYS if self.rules else ("rules",)
        unused = unused if self.layout != DEFAULT_LAYOUT else (*unused, "layout")
        unused = unused if self.budget is not None else (*unused, "budget")
        unused = unused if self.folds != "none" else (*unused, "folds")
        return {key: value for key, value in data.items() if key not in unused}

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """The rules in the order in which they are tried; of today's other keys, `keep` first."""
        if self.rules:
            return self.rules
        one = Rule(
            roles=self.quantize,
            roles_if_present=self.quantize_if_present,
            weights=self.weights,
            activations=self.activations,
        )
        return (*([Rule(names=self.keep, keep=True)] if self.keep else []), one)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes of all rules that quantize, each once."""
        return tuple(dict.fromkeys(rule.scheme for rule in self.all_rules if not rule.keep))

    @property
    def _reads_inputs(self) -> bool:
        """True if an algorithm reads statistics of inputs."""
        return any(algorithm_of(scheme).needs for scheme in self.schemes)

    @property
    def observes_inputs(self) -> bool:
        """True if calibration must measure the inputs of quantized layers."""
        return any(rule.observes_inputs for rule in self.all_rules)

    @property
    def kv_format(self) -> KVFormat | None:
        """The format of the KV cache; None if engines choose."""
        return None if self.kv_cache == "none" else self.kv_cache.format

    @property
    def calibrates_kv(self) -> bool:
        """True if keys and values get scales of their own."""
        return self.kv_cache != "none" and self.kv_cache.scale == "calibrated"

    @property
    def needs_calibration(self) -> bool:
        """True if the model must be run."""
        return (
            self.observes_inputs
            or self.calibrates_kv
            or self.budget is not None
            or self.folds != "none"
        )

    def with_rules(self, rules: Iterable[Rule]) -> Recipe:
        """Return this recipe with these rules, and without a budget."""
        replaced = {*_RULE_KEYS, "rules", "budget"}
        kept = {
            name: getattr(self, name) for name in type(self).model_fields if name not in replaced
        }
        return Recipe(**kept, rules=tuple(rules))

    @classmethod
    def load(cls, name: str | Path) -> Recipe:
        """Return the built-in recipe of that name, or the one in a YAML file.

        Raises:
            RecipeError: The name is unknown, the file cannot be read, or it has keys or values that
                no recipe has. The message names the nearest valid ones.
        """
        path = Path(name)
        is_file = path.suffix in {".yaml", ".yml"}
        if path.exists() or (is_file and translate_name(path.stem) is None):
            return cls._parse(path.stem, _read(path), str(path))
        known = builtin_names()
        if str(name) not in known:
            if (foreign := translate_name(path.stem if is_file else str(name))) is not None:
                raise _foreign(str(name), foreign)
            raise RecipeError(
                f"{name}: no such recipe{_nearest(str(name), known)} "
                "(`fourfold recipes` lists them)"
            )
        text = resources.files("fourfold.recipes").joinpath(f"{name}.yaml").read_text("utf-8")
        return cls._parse(str(name), text, str(name))

    @classmethod
    def _parse(cls, name: str, text: str, where: str) -> Recipe:
        try:
            data = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
            cause = " ".join(str(error).split())
            raise RecipeError(f"{where}: not valid YAML: {cause[:200]}") from None
        if not isinstance(data, dict):
            raise RecipeError(f"{where}: a recipe is a YAML mapping; see `fourfold recipes NAME`.")
        if (foreign := translate(data)) is not None:
            raise _foreign(where, foreign)
        try:
            recipe = cls.model_validate({"name": name, **data})
            patterns = [pattern for rule in recipe.all_rules for pattern in rule.names]
            "".join((recipe.description, *patterns)).encode()
        except ValidationError as error:
            raise RecipeError(f"{where}: {_explain(error)}") from None
        except UnicodeEncodeError as error:
            raise RecipeError(f"{where}: text that is not Unicode: {error.reason}") from None
        return recipe

    def to_yaml(self) -> str:
        """Return this recipe as YAML that `load` reads back."""
        data = self.model_dump(mode="json", exclude={"name"})
        return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)


def builtin_names() -> list[str]:
    """Return the names of the recipes that come with fourfold."""
    folder = resources.files("fourfold.recipes")
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def _foreign(where: str, translation: Translation) -> RecipeError:
    """The error for a recipe of another tool, with the equivalent one where there is any."""
    tool = translation.tool
    if translation.recipe is None:
        return RecipeError(
            f"{where}: a recipe of {tool} that has no equivalent here, because of "
            f"{translation.why_not}. docs/from-modelopt.md says what has."
        )
    recipe = Recipe.model_validate({"name": "recipe", **translation.recipe})
    for name in builtin_names():
        if Recipe.load(name).model_copy(update={"name": "recipe", "description": ""}) == recipe:
            return RecipeError(
                f"{where}: a recipe of {tool}, not of fourfold. Its equivalent is built in: give "
                f"`recipe={name}`."
            )
    text = yaml.safe_dump(dict(translation.recipe), sort_keys=False, default_flow_style=None)
    return RecipeError(
        f"{where}: a recipe of {tool}, not of fourfold. Write its equivalent into a file and give "
        f"that:\n{text.rstrip()}"
    )


def _read(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise RecipeError(
            f"{path}: is a folder or a pipe. Write the recipe into a file, and give its path."
        )
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error


def _explain(error: ValidationError) -> str:
    """Return the first thing that is wrong, with the nearest name for a key that is unknown."""
    errors = error.errors(include_url=False)
    same = [entry for entry in errors if entry["loc"][:1] == errors[0]["loc"][:1]]
    # Of a union, the branch that got furthest; an unknown key explains a missing one, and a check
    # of several keys more than that none of them is `none`.
    ranks = {"extra_forbidden": 2, "value_error": 1, "less_than_equal": 1, "greater_than_equal": 1}
    first = max(same, key=lambda entry: (len(entry["loc"]), ranks.get(entry["type"], 0)))
    # Of unions, and validated models: not keys.
    branches = (
        "KVCache",
        "Activations",
        "Budget",
        "Folds",
        "Headroom",
        "literal[",
        "function-after[",
        "constrained-",
    )
    parts = [part for part in map(str, first["loc"]) if not part.startswith(branches)]
    where, value = ".".join(parts), first.get("input")
    match first["type"]:
        case "extra_forbidden":
            return f"unknown key {where!r}{_nearest(parts[-1], _known_keys(parts))}"
        case "tuple_type":
            return f"{where}: a list is expected, not {_shown(value)}"
        case "literal_error" | "model_type":
            return f"{where}: {_shown(value)} is not known here; see docs/recipes.md"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _shown(value: object) -> str:
    """Return a value in a few characters: a nested one may be endless."""
    if isinstance(value, list | dict | tuple):
        return "a nested value"
    return reprlib.repr(value)


_SECTIONS: dict[str, type[BaseModel]] = {
    "weights": Weights, "activations": Activations, "amax": Headroom, "kv_cache": KVCache,
    "calibration": Calibration, "budget": Budget, "folds": Folds,
}  # fmt: skip


def _known_keys(location: list[str]) -> list[str]:
    """The keys that are allowed where an unknown one was found."""
    section = location[-2] if len(location) > 1 else ""
    model = Rule if section.isdigit() else _SECTIONS.get(section, Recipe)
    return [name for name in model.model_fields if name != "name"]


def _nearest(name: str, known: Collection[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(matches)}?" if matches else f"; known: {', '.join(known)}"

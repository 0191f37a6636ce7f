"""Recipes: what to do, by role. Short YAML, checked when it is read.

    description: NVFP4 W4A16 for routed experts, MSE-chosen block scales
    weights:     {format: nvfp4, scale: mse}   # scale: max | mse; scale_group: expert | layer
    activations: none                          # W4A16; or {format: nvfp4, amax: max} (W4A4)
    kv_cache:    none                          # or {format: fp8, scale: cast | calibrated}
    calibration: {all_experts: false}          # true: every expert is shown every token
    quantize:    [experts]                     # roles that the model must have
    quantize_if_present: [shared_experts]      # roles that it may lack
    keep:        ["*.layers.0.*"]              # name patterns that stay as they are

Every role under `quantize` and every pattern must match something in the model, and one role at
least must, or the run does not begin.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fourfold.errors import RecipeError

DEFAULT_RECIPE = "w4a16_nvfp4_experts_only_mse"

QUANTIZABLE_ROLES = (
    "experts", "shared_experts", "mlp", "attention", "linear_attention", "lm_head", "mtp",
)  # fmt: skip
"""Roles that a recipe may quantize. Routers, embeddings, vision towers and norms never are."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Weights(_Strict):
    """How weights are stored, and how their block scales are chosen."""

    format: Literal["nvfp4"] = "nvfp4"
    scale: Literal["max", "mse"] = "mse"
    scale_group: Literal["expert", "layer"] = "expert"
    """What of the routed experts shares a global scale: gate and up of each expert, or gates and
    ups of all experts of a layer, and their downs."""


class Headroom(_Strict):
    """Room above the largest activation that calibration saw: its amax times 2^headroom."""

    headroom: int = Field(ge=0, le=6)


class Activations(_Strict):
    """How engines shall round the inputs of quantized layers (W4A4)."""

    format: Literal["nvfp4"] = "nvfp4"
    amax: Literal["max"] | Headroom = "max"

    @property
    def factor(self) -> float:
        """What the largest activation is multiplied with."""
        return 1.0 if self.amax == "max" else 2.0**self.amax.headroom


class KVCache(_Strict):
    """How engines shall store keys and values. `cast` needs no calibration and no tensors."""

    format: Literal["fp8"] = "fp8"
    scale: Literal["cast", "calibrated"] = "cast"


class Calibration(_Strict):
    """How activations are observed."""

    all_experts: bool = False
    """Show every token to every expert, for statistics; the output stays the routed one."""


class Recipe(_Strict):
    """What to do with a model, by role. `name` is that of the file or of the built-in recipe."""

    name: str = "recipe"
    description: str = ""
    weights: Weights = Weights()
    activations: Literal["none"] | Activations = "none"
    kv_cache: Literal["none"] | KVCache = "none"
    calibration: Calibration = Calibration()
    quantize: tuple[str, ...] = ()
    quantize_if_present: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    @field_validator("quantize", "quantize_if_present", "keep", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("quantize", "quantize_if_present")
    @classmethod
    def _known_roles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for role in value:
            if role not in QUANTIZABLE_ROLES:
                raise ValueError(
                    f"role {role!r} cannot be quantized{_nearest(role, QUANTIZABLE_ROLES)}"
                )
        return value

    @model_validator(mode="after")
    def _some_role(self) -> Recipe:
        if not self.roles:
            raise ValueError("name at least one role under quantize")
        return self

    @model_validator(mode="after")
    def _something_to_calibrate(self) -> Recipe:
        if self.calibration.all_experts and not self.is_w4a4:
            raise ValueError("calibration.all_experts: only where activations are quantized")
        return self

    @model_validator(mode="after")
    def _some_experts(self) -> Recipe:
        if self.weights.scale_group == "layer" and not self.roles & {"experts", "mtp"}:
            raise ValueError("weights.scale_group: layer is of routed experts: quantize experts")
        return self

    @property
    def is_w4a4(self) -> bool:
        """Whether activations are quantized, too."""
        return self.activations != "none"

    @property
    def calibrates_kv(self) -> bool:
        """Whether keys and values get scales of their own."""
        return self.kv_cache != "none" and self.kv_cache.scale == "calibrated"

    @property
    def needs_calibration(self) -> bool:
        """Whether the model must be run."""
        return self.is_w4a4 or self.calibrates_kv

    @property
    def roles(self) -> frozenset[str]:
        """Every role that is quantized where the model has it."""
        return frozenset(self.quantize) | frozenset(self.quantize_if_present)

    @classmethod
    def load(cls, name: str | Path) -> Recipe:
        """The built-in recipe of that name, or the one in a YAML file.

        Raises `RecipeError` for an unknown name (with the nearest ones), a file that cannot be
        read, and keys or values that no recipe has.
        """
        path = Path(name)
        if path.suffix in {".yaml", ".yml"} or path.exists():
            return cls._parse(path.stem, _read(path), str(path))
        known = builtin_names()
        if str(name) not in known:
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
        try:
            recipe = cls.model_validate({"name": name, **data})
            "".join((recipe.description, *recipe.keep)).encode()
        except ValidationError as error:
            raise RecipeError(f"{where}: {_explain(error)}") from None
        except UnicodeEncodeError as error:
            raise RecipeError(f"{where}: text that is not Unicode: {error.reason}") from None
        return recipe

    def to_yaml(self) -> str:
        """This recipe as YAML that `load` reads back."""
        data = self.model_dump(mode="json", exclude={"name"})
        return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)


def builtin_names() -> list[str]:
    """The names of the recipes that come with fourfold."""
    folder = resources.files("fourfold.recipes")
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def _read(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise RecipeError(f"{path}: is no file.")
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error


def _explain(error: ValidationError) -> str:
    """The first thing wrong, with the nearest name for a key that is not known."""
    errors = error.errors(include_url=False)
    same = [each for each in errors if each["loc"][:1] == errors[0]["loc"][:1]]
    # Of a union, the branch that got furthest; and a key that is not known explains one that lacks.
    first = max(same, key=lambda each: (len(each["loc"]), each["type"] == "extra_forbidden"))
    parts = [str(part) for part in first["loc"] if not _is_branch(part)]
    where, given = ".".join(parts), first.get("input")
    match first["type"]:
        case "extra_forbidden":
            return f"unknown key {where!r}{_nearest(parts[-1], _known_keys(parts))}"
        case "tuple_type":
            return f"{where}: a list is expected, not {_shown(given)}"
        case "literal_error" | "model_type":
            return f"{where}: {_shown(given)} is not known here; see docs/recipes.md"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _shown(value: object) -> str:
    """What was given, short: a nested value may be endless."""
    if isinstance(value, list | dict | tuple):
        return "a nested value"
    return reprlib.repr(value)


_BRANCHES = {"KVCache", "Activations", "Headroom"}


def _is_branch(part: int | str) -> bool:
    """Whether a part of an error's location names a branch of a union, not a key."""
    return part in _BRANCHES or str(part).startswith("literal[")


def _known_keys(location: list[str]) -> Iterable[str]:
    parents: dict[str, type[BaseModel]] = {
        "weights": Weights, "activations": Activations, "amax": Headroom, "kv_cache": KVCache,
        "calibration": Calibration,
    }  # fmt: skip
    model = parents.get(location[-2], Recipe) if len(location) > 1 else Recipe
    return [name for name in model.model_fields if name != "name"]


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(matches)}?" if matches else f"; known: {', '.join(known)}"

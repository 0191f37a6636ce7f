"""fourfold: quantize Mixture-of-Experts checkpoints to NVFP4, and prove it tensor by tensor.

    import fourfold

    plan = fourfold.plan("path/to/model", recipe="w4a16_nvfp4_experts_only_mse")
    result = fourfold.quantize("path/to/model", "out", recipe="w4a16_nvfp4_experts_only_mse")
    report = fourfold.verify("out", source="path/to/model")
    model = fourfold.load("out", simulate_activations=True)

Importing it is quick: PyTorch and transformers are imported when they are first needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fourfold._version import __version__
from fourfold.errors import (
    CalibrationError,
    FourfoldError,
    ModelError,
    NonFiniteError,
    ObservationError,
    OutputError,
    PlanError,
    RecipeError,
    ResourceError,
    SourceError,
    UnreadableError,
    UsageError,
    WeightLostError,
)

if TYPE_CHECKING:
    from fourfold.api import Result, plan, quantize
    from fourfold.calibration.statistics import Statistics
    from fourfold.evaluation.loading import load
    from fourfold.events import Event
    from fourfold.planning import Plan
    from fourfold.recipes import Recipe
    from fourfold.run.convert import Converted, convert
    from fourfold.run.merge import merge
    from fourfold.verification import Finding, Report, verify

_LAZY = {
    "convert": "fourfold.run.convert",
    "Converted": "fourfold.run.convert",
    "Event": "fourfold.events",
    "load": "fourfold.evaluation.loading",
    "merge": "fourfold.run.merge",
    "plan": "fourfold.api",
    "quantize": "fourfold.api",
    "Result": "fourfold.api",
    "Plan": "fourfold.planning",
    "Recipe": "fourfold.recipes",
    "Statistics": "fourfold.calibration.statistics",
    "verify": "fourfold.verification",
    "Report": "fourfold.verification",
    "Finding": "fourfold.verification",
}

__all__ = [
    "CalibrationError",
    "Converted",
    "Event",
    "Finding",
    "FourfoldError",
    "ModelError",
    "NonFiniteError",
    "ObservationError",
    "OutputError",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "Report",
    "ResourceError",
    "Result",
    "SourceError",
    "Statistics",
    "UnreadableError",
    "UsageError",
    "WeightLostError",
    "__version__",
    "convert",
    "load",
    "merge",
    "plan",
    "quantize",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fourfold' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

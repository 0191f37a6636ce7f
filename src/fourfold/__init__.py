# SPDX-License-Identifier: Apache-2.0
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
    FourfoldWarning,
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
    from fourfold.api import (
        convert,
        evaluate,
        generate,
        load,
        merge,
        plan,
        quantize,
        sensitivity,
        verify,
    )
    from fourfold.calibration.statistics import Statistics
    from fourfold.config import CalibrationConfig, EvaluationConfig, OutputConfig, Runtime
    from fourfold.evaluation.evaluated import Evaluation
    from fourfold.evaluation.generation import Generation
    from fourfold.evaluation.sensitivity import Sensitivity
    from fourfold.events import Event
    from fourfold.planning import Plan
    from fourfold.recipes import Recipe
    from fourfold.run.convert import Converted
    from fourfold.run.merge import Merged
    from fourfold.run.result import Result
    from fourfold.verification import Finding, Report

_LAZY = {
    "CalibrationConfig": "fourfold.config",
    "Converted": "fourfold.run.convert",
    "Evaluation": "fourfold.evaluation.evaluated",
    "EvaluationConfig": "fourfold.config",
    "Event": "fourfold.events",
    "Finding": "fourfold.verification",
    "Generation": "fourfold.evaluation.generation",
    "Merged": "fourfold.run.merge",
    "OutputConfig": "fourfold.config",
    "Plan": "fourfold.planning",
    "Recipe": "fourfold.recipes",
    "Report": "fourfold.verification",
    "Result": "fourfold.run.result",
    "Runtime": "fourfold.config",
    "Sensitivity": "fourfold.evaluation.sensitivity",
    "Statistics": "fourfold.calibration.statistics",
    "convert": "fourfold.api",
    "evaluate": "fourfold.api",
    "generate": "fourfold.api",
    "load": "fourfold.api",
    "merge": "fourfold.api",
    "plan": "fourfold.api",
    "quantize": "fourfold.api",
    "sensitivity": "fourfold.api",
    "verify": "fourfold.api",
}

__all__ = [
    "CalibrationConfig",
    "CalibrationError",
    "Converted",
    "Evaluation",
    "EvaluationConfig",
    "Event",
    "Finding",
    "FourfoldError",
    "FourfoldWarning",
    "Generation",
    "Merged",
    "ModelError",
    "NonFiniteError",
    "ObservationError",
    "OutputConfig",
    "OutputError",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "Report",
    "ResourceError",
    "Result",
    "Runtime",
    "Sensitivity",
    "SourceError",
    "Statistics",
    "UnreadableError",
    "UsageError",
    "WeightLostError",
    "__version__",
    "convert",
    "evaluate",
    "generate",
    "load",
    "merge",
    "plan",
    "quantize",
    "sensitivity",
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

# SPDX-License-Identifier: Apache-2.0
"""Every error a user can cause, as one tree.

    FourfoldError                 exit code 1
    ├── UsageError                exit code 2, also a ValueError: an option or argument is wrong
    │   ├── RecipeError           a recipe: unknown name, key, role; a pattern without a match
    │   └── CalibrationError      `calib`: missing, malformed, too little; ids the model lacks
    ├── SourceError               the checkpoint that is read: folder, index, shard, header, config
    │   ├── DamagedError          a value that no such checkpoint has: a negative scale, an index
    │   │   └── NonFiniteError    a weight that holds NaN or Inf
    │   ├── SourceChangedError    a file that is not as it was when the run began
    │   └── UnreadableError       exit code 2: what should be verified is no NVFP4 checkpoint
    ├── ModelError                an architecture that cannot be taken apart
    ├── ObservationError          activations with NaN or Inf; an input that no token reached
    ├── PlanError                 recipe × model cannot work: shapes, groups, schemes
    ├── WeightLostError           a weight that its format cannot hold
    ├── ResourceError             the machine has too little memory, or the disk too little room
    └── OutputError               the folder that is written

Beside the tree stands `FourfoldWarning`, the category of everything that is warned of.

A message names the object, the cause and the remedy, in one or two lines. `assert` is for
what cannot happen.
"""

from __future__ import annotations


class FourfoldError(Exception):
    """Base of every error that fourfold raises on purpose."""

    exit_code = 1

    resumable = True
    """True if the same command may succeed later, so that an unfinished run is kept for it."""


class FourfoldWarning(UserWarning):
    """Something went otherwise than it was meant, and the output is valid all the same."""


class UsageError(FourfoldError, ValueError):
    """An option or an argument is wrong."""

    exit_code = 2
    resumable = False


class RecipeError(UsageError):
    """A recipe is unknown, malformed, or names something that this model lacks."""


class CalibrationError(UsageError):
    """Calibration data is missing, malformed or too little, or does not fit the model."""


class SourceError(FourfoldError):
    """The checkpoint that is read is missing, broken or unsafe."""


class DamagedError(SourceError):
    """A tensor of the source holds values that it cannot have."""

    resumable = False


class NonFiniteError(DamagedError):
    """A weight holds NaN or Inf."""


class SourceChangedError(SourceError):
    """A file of the source is not as it was when it was opened."""


class UnreadableError(SourceError):
    """A checkpoint to verify or to compare with cannot be read, or is not an NVFP4 checkpoint."""

    exit_code = 2


class ModelError(FourfoldError):
    """The architecture is unknown, or has a part that cannot be taken apart."""

    resumable = False


class ObservationError(FourfoldError):
    """Calibration observed NaN or Inf, or nothing at all, so that there is no scale."""

    resumable = False


class PlanError(FourfoldError):
    """The recipe cannot be carried out on this model."""

    resumable = False


class WeightLostError(FourfoldError):
    """A weight is so small beside others of its scale group that its format cannot hold it."""

    resumable = False


class ResourceError(FourfoldError):
    """The machine has too little memory for the plan, or the disk too little room."""


class OutputError(FourfoldError):
    """The output folder cannot be written, or holds something already."""

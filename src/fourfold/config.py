# SPDX-License-Identifier: Apache-2.0
"""The options of a run as objects: what to calibrate on, where to compute, what to write, and what
to measure it on.

    fourfold.quantize(
        model,
        out,
        recipe,
        calibration=CalibrationConfig(calib="data.jsonl", calib_size=256),
        runtime=Runtime(device="cuda:0"),
        output=OutputConfig(overwrite=True),
    )

Fields have the names of the command line's options. Every check of an argument is here, and is made
when the object is: an option that is out of range, or has no effect beside another, is a
`UsageError`.

Messages name arguments in backticks, as Python spells them (`calib_size=0`). The command line
shows its own spelling of them (--calib-size 0); see `cli.options`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.errors import UsageError

PACKINGS = ("packed", "padded")


@dataclass(frozen=True)
class CalibrationConfig:
    """The text that the model reads while its activations are observed, for recipes that need it.

    `quantize` also takes short forms of it; see `CalibrationConfig.of`.
    """

    calib: str | Path | Sequence[str | Path] = ()
    """A file (text, JSONL, Parquet), a dataset of the hub (`org/name[:config][:split]`), or several
    of them. By default a mixed text that comes with fourfold."""
    calib_size: int | None = None
    """The number of samples. By default up to 128, as many as the data has."""
    calib_seq: int | None = None
    """Tokens of a sample. By default 512, or what the model takes if that is less."""
    batch_size: int = 8
    """The number of samples that pass the model together."""
    packing: str = "packed"
    """"packed" joins documents and cuts them into full samples; "padded" makes each a sample."""
    seed: int = 0
    """Random seed for the choice of samples."""
    statistics: Any = None
    """The `fourfold.Statistics` of an earlier run, or the path of its `calibration.safetensors`.
    The model is not run then."""
    activation_memory: int | None = None
    """Bytes of activations that are kept in memory; what exceeds it waits in a file in `out`. By
    default half of what is free."""

    def __post_init__(self) -> None:
        _check_whole("calib_size", self.calib_size, least=1)
        _check_whole("calib_seq", self.calib_seq, least=2)
        _check_whole("batch_size", self.batch_size, least=1)
        _check_whole("seed", self.seed)
        _check_whole("activation_memory", self.activation_memory, least=0)
        names = [self.calib] if isinstance(self.calib, str | Path) else self.calib
        check_type("calib", names, Sequence, "a file, the name of a dataset, or a list of them")
        for name in names:
            check_type("calib", name, str | Path, "a file or the name of a dataset")
        _check_statistics("statistics", self.statistics)
        if self.packing not in PACKINGS:
            raise UsageError(f"`packing={self.packing}`: give 'packed' or 'padded'.")
        if self.files and self.statistics is not None:
            raise UsageError("give `calib` or `statistics`, not both.")
        if self.statistics is not None and self._sizes:
            raise UsageError(f"`{self._sizes[0]}` has no effect with `statistics`; remove it.")

    @classmethod
    def of(
        cls, value: CalibrationConfig | str | Path | Sequence[str | Path] | Any
    ) -> CalibrationConfig:
        """The config that a short form stands for.

        Args:
            value: A config; None for the defaults; the path of a `.safetensors` file or a
                `Statistics` for the statistics of an earlier run; any other path or name, or a
                sequence of them, for calibration data.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, str | Path):
            is_statistics = Path(value).suffix == ".safetensors"
            return cls(statistics=value) if is_statistics else cls(calib=value)
        if isinstance(value, Sequence):
            return cls(calib=value)
        _check_statistics("calibration", value)
        return cls(statistics=value)

    @property
    def files(self) -> tuple[str, ...]:
        """The names in `calib`."""
        names = [self.calib] if isinstance(self.calib, str | Path) else self.calib
        return tuple(map(str, names))

    @property
    def _sizes(self) -> list[str]:
        """The names of the sizes that the caller has set."""
        return [name for name in ("calib_size", "calib_seq") if getattr(self, name) is not None]

    def check_use(
        self, recipe: str, *, needs_calibration: bool, has_forward_loop: bool, is_live: bool
    ) -> None:
        """Raise `UsageError` for what the recipe or the model cannot use.

        Args:
            recipe: Its name.
            needs_calibration: True if the recipe calibrates activations or the KV cache.
            has_forward_loop: True if the caller gave a loop that calls the model on data.
            is_live: True for a transformers model in memory.
        """
        sources = {
            "calib": bool(self.files),
            "statistics": self.statistics is not None,
            "forward_loop": has_forward_loop,
        }
        names = [name for name, is_given in sources.items() if is_given]
        if len(names) > 1:
            raise UsageError(f"give `{names[0]}` or `{names[1]}`, not both.")
        if has_forward_loop and not is_live:
            raise UsageError(
                "`forward_loop`: only for a transformers model in memory. Give `calib` instead."
            )
        names += self._sizes
        if names and not needs_calibration:
            raise UsageError(
                f"recipe {recipe} quantizes no activations, or with constant scales. Remove "
                f"`{names[0]}`, or choose another recipe."
            )
        if has_forward_loop and self._sizes:
            raise UsageError(f"`{self._sizes[0]}` has no effect with `forward_loop`; remove it.")


@dataclass(frozen=True)
class Runtime:
    """The device that computes, and how much of the machine a run may take."""

    device: str = "auto"
    """The device that quantizes and runs the model for calibration: cpu, cuda, cuda:N, or auto,
    which takes a GPU if there is one. Quantized weights do not depend on it, but for those whose
    algorithm reads second moments of the inputs."""
    device_memory: int | None = None
    """Bytes of the device that quantization may take. By default up to 1 GiB, and 8 GiB for
    algorithms that read second moments, but no more than half of what is free."""
    threads: int | None = None
    """Worker threads; by default one for each core. The output does not depend on it, but for the
    rounding of the matrix products in a calibration."""
    keep_source: bool | None = None
    """Of a model on the hub: True keeps its shards in the hub's cache, False deletes each of them
    once it is quantized. By default they are kept if all of them have room beside `out`."""

    def __post_init__(self) -> None:
        check_type("device", self.device, str, "cpu, cuda, cuda:N or auto")
        _check_whole("device_memory", self.device_memory, least=1)
        _check_whole("threads", self.threads, least=1)
        check_type("keep_source", self.keep_source, bool | None, "True or False")


@dataclass(frozen=True)
class OutputConfig:
    """How the output is cut into files, whether it may replace others, and whether to verify it."""

    shards: int | None = None
    """Files that a decoder layer is cut into, at least; by default one for each rank."""
    overwrite: bool = False
    """Replace what fourfold wrote into `out` earlier, finished or not."""
    verify: bool = True
    """Read the output back and compare it with the source, tensor by tensor."""
    strict: bool = False
    """Make an error of what is otherwise repaired or warned of: a weight that is lost beside its
    scale group, an input that was always 0, an expert that no calibration token reached."""
    preview: bool | str = False
    """Let the source and the output continue a text, which is `Result.preview`: this one, or for
    True the beginning of a calibration sample."""
    reference: str | Path | None = None
    """The checkpoint that a quantized source was made from: errors are reported against it, too."""

    def __post_init__(self) -> None:
        _check_whole("shards", self.shards, least=1)
        for name in ("overwrite", "verify", "strict"):
            check_type(name, getattr(self, name), bool, "True or False")
        check_type("reference", self.reference, str | Path | None, "a checkpoint's folder")
        if self.reference is not None and not self.verify:
            raise UsageError("`reference`: has no effect without `verify`. Leave one of them out.")
        check_type("preview", self.preview, bool | str, "True, False or a text")
        if isinstance(self.preview, str) and not self.preview.strip():
            raise UsageError("`preview`: the prompt is empty. Give a text, or True for a sample.")


@dataclass(frozen=True)
class EvaluationConfig:
    """The text that models are measured on, and how much of what the source predicts is kept."""

    text: str | Path
    """A file (text, JSONL, Parquet) or a dataset of the hub (`org/name[:config][:split]`)."""
    length: int | None = None
    """Tokens of a window. By default 2048, or what the model takes if that is less."""
    windows: int | None = None
    """The number of windows. By default up to 32, as many as the text has."""
    tokens: int | None = None
    """The number of tokens instead, rounded down to whole windows."""
    top: int = 4096
    """How many of the source's likeliest tokens are compared one by one; the others count as one.
    A smaller vocabulary is compared as a whole."""
    cache: str | Path | bool = True
    """The folder in which predictions of the source are kept for later runs; True for
    `fourfold/evaluation` in the user's cache folder. False keeps them for this run only."""
    activation_memory: int | None = None
    """Bytes of hidden states that are kept in memory; what exceeds it waits in a file. By default
    half of what is free."""

    def __post_init__(self) -> None:
        check_type("text", self.text, str | Path, "a file or the name of a dataset")
        _check_whole("length", self.length, least=2)
        _check_whole("windows", self.windows, least=1)
        _check_whole("tokens", self.tokens, least=1)
        _check_whole("top", self.top, least=5)
        _check_whole("activation_memory", self.activation_memory, least=0)
        check_type("cache", self.cache, str | Path | bool, "a folder, True or False")
        if not str(self.text):
            raise UsageError("`text` is empty: give a file or the name of a dataset.")
        if self.windows is not None and self.tokens is not None:
            raise UsageError("give `windows` or `tokens`, not both.")


def check_type(name: str, value: object, wanted: Any, described: str) -> None:
    """Raise `UsageError` unless the argument `name` is of a type that is `wanted`."""
    if not isinstance(value, wanted):
        raise UsageError(f"`{name}={value!r:.60}`: give {described}.")


def output_folder(out: str | Path) -> Path:
    """The folder that `out` names. Raises `UsageError` if it is empty."""
    check_type("out", out, str | Path, "the folder to write")
    if not str(out):
        raise UsageError("`out` is empty: give the folder to write.")
    return Path(out).expanduser()


def _check_statistics(name: str, value: object) -> None:
    if not isinstance(value, str | Path | None) and not hasattr(value, "sites"):
        wanted = "the Statistics of an earlier run or their file"
        if name == "calibration":
            wanted += ", files or datasets, or a CalibrationConfig"
        raise UsageError(f"`{name}={value!r:.60}`: give {wanted}.")


def _check_whole(name: str, value: int | None, *, least: int | None = None) -> None:
    """Raise `UsageError` unless `value` is None, or a whole number of at least `least`."""
    if value is None or (type(value) is int and (least is None or value >= least)):
        return
    at_least = "" if least is None else f" of at least {least}"
    raise UsageError(f"`{name}={value}`: give a whole number{at_least}.")

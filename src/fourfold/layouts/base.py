# SPDX-License-Identifier: Apache-2.0
"""How a quantized checkpoint is laid out: the interface of a layout, and the registry.

A format says which parts a weight has; a layout says under which names and in which encoding a
checkpoint stores them, and what the configuration files say about them. Engines know a layout by
`quantization_config.quant_method` in config.json.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from fourfold.errors import PlanError
from fourfold.formats.base import FORMATS, Spec
from fourfold.formats.kv_cache import KVFormat
from fourfold.formats.registry import Registry
from fourfold.formats.scheme import Scheme
from fourfold.models.peculiarities import NONE, Peculiarities

if TYPE_CHECKING:
    import numpy as np

    from fourfold.layouts.stacks import Stack


class TensorSpec(NamedTuple):
    """A tensor of a checkpoint: its name, dtype (as safetensors names it) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointContents:
    """The facts that the configuration files of a checkpoint must state."""

    schemes: Mapping[str, Scheme]
    """The scheme of every quantized linear weight, by name."""
    ignore: Sequence[str]
    """The list that `Layout.ignore` returned."""
    kv_cache: KVFormat | None
    """The format that engines shall keep keys and values in; None if they choose."""
    peculiar: Peculiarities = NONE
    """What engines do in the model's family."""


class Layout(ABC):
    """The tensor names, encodings and configuration files that engines expect."""

    name: ClassVar[str]
    marker_files: ClassVar[tuple[str, ...]] = ()
    """Files besides config.json that mark a folder as a finished checkpoint of this layout. They
    are removed before an old checkpoint is replaced, and written just before config.json."""
    suffixes: ClassVar[Mapping[str, Mapping[str, str]]]
    """Last names of tensors: format → part → name. A format that is missing here cannot be laid
    out."""
    kv_formats: ClassVar[frozenset[KVFormat]] = frozenset({"fp8"})
    """The formats of a KV cache that the configuration can state."""
    k_scale: ClassVar[str] = "k_scale"
    v_scale: ClassVar[str] = "v_scale"
    kv_scale: ClassVar[Spec] = ("F32", ())
    """Dtype and shape of a scale of keys or values."""
    only_converts: ClassVar[bool] = False
    """True if `convert` writes it, from a checkpoint in another layout, and `quantize` does not."""
    needs_kv_scales: ClassVar[bool] = False
    """True if scales of 1 are written for a KV cache that is not calibrated: a reader takes another
    number for a missing one."""

    # --------------------------------------------------------------------------------- tensors

    def check(self, schemes: Mapping[str, Scheme], peculiar: Peculiarities) -> None:  # noqa: B027
        """Raise `PlanError` unless this layout can express the schemes, given by linear weight.

        `peculiar` is what engines do in the model's family.
        """

    def tensors(self, linear: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
        """Return the tensors that one linear weight `[out, in]` becomes, by part."""
        specs = dict(FORMATS[scheme.weights].parts(shape))
        names = dict(self.suffixes[scheme.weights])
        if scheme.activations is not None:
            specs |= FORMATS[scheme.activations].input_parts()
            names |= self.suffixes[scheme.activations]
        return {
            part: TensorSpec(f"{linear}.{names[part]}", *self.encoded(part, spec))
            for part, spec in specs.items()
        }

    def stacks(self, config: Mapping[str, Any]) -> tuple[Stack, ...]:
        """Return how the experts of a config.json's family are stacked, instead of having tensors
        of their own; empty if they are not.

        Raises:
            PlanError: This layout is not for that family.
        """
        return ()

    def encoded(self, part: str, spec: tuple[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape of a part in a checkpoint, given those that the format has."""
        return spec

    def encode(self, part: str, value: float, scheme: Scheme) -> np.ndarray[Any, Any]:
        """Return a scale of a weight in `scheme` that is a single number, as it is stored."""
        import numpy as np

        return np.array([value], dtype=np.float32)

    @property
    def part_names(self) -> frozenset[str]:
        """Last names of tensors that engines take for a part of a quantized layer, but for the one
        that a plain weight has, too."""
        names = {name for names in self.suffixes.values() for name in names.values()}
        return frozenset(names - {"weight"} | {self.k_scale, self.v_scale})

    @abstractmethod
    def is_leftover(self, name: str, dtype: str) -> bool:
        """True if a tensor looks like what some quantizer left, which no loader expects."""

    @abstractmethod
    def kv_scale_names(self, linears: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Return the names of the scales of keys and values, by attention module.

        `linears` names all linear layers of the model's attention modules; the module around one
        of them is an attention module. See `layers_of_keys`.
        """

    # --------------------------------------------------------------------------- configuration

    @abstractmethod
    def ignore(
        self, quantized: Sequence[str], kept: Sequence[str], peculiar: Peculiarities
    ) -> list[str]:
        """Return the list of modules that engines leave unquantized, in the words of this layout.

        `peculiar` is what engines do in the model's family.

        Raises:
            PlanError: No list says to every engine which are `quantized` and which are `kept`.
        """

    @abstractmethod
    def quantization_config(self, contents: CheckpointContents) -> dict[str, Any]:
        """Return the value of `quantization_config` in config.json."""

    def config_files(self, contents: CheckpointContents) -> dict[str, dict[str, Any]]:
        """Return the contents of the configuration files besides config.json, by file name."""
        return {}

    @abstractmethod
    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """True if a config.json is that of a checkpoint in this layout."""


def check_some_nvfp4(schemes: Mapping[str, Scheme]) -> None:
    """Raise `PlanError` unless some of the weights are NVFP4."""
    if not any(scheme.weights == "nvfp4" for scheme in schemes.values()):
        linear, scheme = next(iter(schemes.items()))
        raise PlanError(
            f"{linear} would be {scheme}, and no weight NVFP4. Quantize some of them to "
            "weights: {format: nvfp4}."
        )


def layers_of_keys(linears: Iterable[str]) -> dict[str, str]:
    """Return the linear layer that computes the keys, by attention module.

    Where keys have no layer of their own (MLA's latent cache, DBRX's Wqkv), engines use a scale of
    1 and there is no entry. A `k_proj` without a layer for values computes both (Gemma 4).
    """
    names, layers = set(linears), {}
    with_values = {name.rpartition(".v_")[0] for name in names}
    for name in sorted(names):
        parent, _, leaf = name.rpartition(".")
        is_k = leaf == "k_proj" and (f"{parent}.v_proj" in names or parent not in with_values)
        if is_k or leaf == "qkv_proj":
            layers[parent] = name
    return layers


LAYOUTS: Registry[Layout] = Registry(
    {
        "modelopt": "fourfold.layouts.modelopt:ModelOpt",
        "modelopt-stacked": "fourfold.layouts.stacked:StackedModelOpt",
        "compressed-tensors": "fourfold.layouts.compressed_tensors:CompressedTensors",
    }
)
"""The layouts by name."""


def marker_files() -> list[str]:
    """Return the marker files of every layout: a folder may hold a checkpoint of any of them."""
    return list(dict.fromkeys(name for layout in LAYOUTS.values() for name in layout.marker_files))

"""The codecs that quantized checkpoints can be read with, by name."""

from __future__ import annotations

from fourfold.sources.codecs.base import TensorCodec
from fourfold.sources.codecs.modelopt_nvfp4 import ModelOptNVFP4

CODECS: dict[str, TensorCodec] = {codec.name: codec for codec in (ModelOptNVFP4(),)}
"""Every codec by its name. A tensor belongs to the first one that claims it."""

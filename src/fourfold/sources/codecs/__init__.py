# SPDX-License-Identifier: Apache-2.0
"""The ways in which quantized checkpoints store their weights."""

from fourfold.sources.codecs.base import (
    CODECS,
    EncodedWeight,
    MXFP4Codec,
    ReadRows,
    TensorCodec,
    presented,
)

__all__ = [
    "CODECS",
    "EncodedWeight",
    "MXFP4Codec",
    "ReadRows",
    "TensorCodec",
    "presented",
]

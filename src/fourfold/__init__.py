"""fourfold: quantize Mixture-of-Experts checkpoints to NVFP4, and prove it tensor by tensor."""

from fourfold._version import __version__

__all__ = ["__version__"]

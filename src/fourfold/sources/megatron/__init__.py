"""Megatron's `torch_dist` checkpoints, read with PyTorch alone: no Megatron, no GPU."""

from fourfold.sources.megatron.source import MegatronFolder as MegatronFolder

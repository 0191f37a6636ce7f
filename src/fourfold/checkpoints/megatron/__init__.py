"""Megatron's `torch_dist` checkpoints, read with PyTorch alone: no Megatron, no GPU."""

from fourfold.checkpoints.megatron.source import MegatronFolder as MegatronFolder

# SPDX-License-Identifier: Apache-2.0
"""Megatron models: `torch_dist` checkpoints, and models in memory on one or many ranks.

The names below are all that the rest of fourfold uses. PyTorch is enough to read a checkpoint:
neither megatron-core nor a GPU is needed, and megatron-core is never imported.
"""

from fourfold.sources.megatron.checkpoint import MegatronCheckpoint as MegatronCheckpoint
from fourfold.sources.megatron.live.modules import is_megatron as is_megatron
from fourfold.sources.megatron.live.source import LiveMegatron as LiveMegatron
from fourfold.sources.megatron.metadata import find_iteration as find_iteration

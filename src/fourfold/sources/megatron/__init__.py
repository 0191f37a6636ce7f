"""Megatron models: `torch_dist` checkpoints, and models that are in memory on one or many ranks.

The names below are all that the rest of fourfold uses. PyTorch is enough to read a checkpoint:
neither megatron-core nor a GPU is needed, and megatron-core is never imported.
"""

from fourfold.sources.megatron.live import LiveMegatron as LiveMegatron
from fourfold.sources.megatron.live import is_megatron as is_megatron
from fourfold.sources.megatron.metadata import iteration_folder as iteration_folder
from fourfold.sources.megatron.sizes import OWN as OWN
from fourfold.sources.megatron.source import MegatronFolder as MegatronFolder
from fourfold.sources.megatron.tensors import MegatronTensors as MegatronTensors

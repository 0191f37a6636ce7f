"""A model of Megatron that is live in memory, on as many ranks as share it."""

from fourfold.sources.megatron.live.modules import is_megatron as is_megatron
from fourfold.sources.megatron.live.source import LiveMegatron as LiveMegatron

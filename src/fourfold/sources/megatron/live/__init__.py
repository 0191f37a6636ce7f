"""A Megatron model in memory, on one or many ranks."""

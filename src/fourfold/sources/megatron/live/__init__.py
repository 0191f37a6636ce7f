# SPDX-License-Identifier: Apache-2.0
"""A Megatron model in memory, on one or many ranks."""

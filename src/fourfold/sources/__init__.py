# SPDX-License-Identifier: Apache-2.0
"""The sources that tensors are read from: folders, the hub, Megatron checkpoints, live models."""

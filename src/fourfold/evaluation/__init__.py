# SPDX-License-Identifier: Apache-2.0
"""Loading, running, measuring and inspecting quantized checkpoints, without an engine."""

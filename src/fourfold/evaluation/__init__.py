"""Loading, running, measuring and inspecting quantized checkpoints, without an engine."""

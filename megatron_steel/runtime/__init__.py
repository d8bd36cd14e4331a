"""Devices, process groups, seeds, and the layer that lets megatron-core run on CPU over gloo."""

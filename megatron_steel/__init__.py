"""megatron_steel: an exact, readable training engine for 0.1B to 8B language models on megatron-core."""

__version__ = "0.1.0"

"""Open-Llama for transformers 5, which no longer has it."""

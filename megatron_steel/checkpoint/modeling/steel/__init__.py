"""Steel-LLM for transformers 5."""

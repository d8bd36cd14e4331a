"""Saving, loading, resuming, and Hugging Face import and export."""

"""Held-out loss and generation."""

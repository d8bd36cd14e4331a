"""Command lines over the rooms; no logic of their own."""

"""Code written beside exported weights of families transformers does not know; it imports nothing of this package."""

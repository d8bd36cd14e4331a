"""Loss functions and forward steps."""

"""Parameters, FLOPs, memory and time from the configuration alone. No torch."""

"""One optimizer step, the loop, the wiring."""

"""Layer backends, model families and the order in which a model is built."""

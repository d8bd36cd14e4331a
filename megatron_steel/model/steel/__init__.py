"""Feed-forwards of Steel-LLM: double SwiGLU and soft mixtures of experts."""

"""Triton kernels for what the ``torch`` layer backend computes on a GPU; only ``choice.py`` can be imported without."""

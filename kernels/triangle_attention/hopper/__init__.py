"""Kernels for Hopper alone, in Gluon. `choice.py` says when `forward.launch` takes them."""

"""Kernels for Hopper alone, in Gluon. `choice.py` and `dbias_choice.py` say when the launchers take them."""

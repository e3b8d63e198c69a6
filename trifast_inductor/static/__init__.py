"""`python -m trifast_inductor inspect`: what the compiler made of each kernel, without a GPU.

Registers, spills, shared memory and instructions a logit are free of noise, so a change for the worse shows at once.
"""

from trifast_inductor.static.command import main

__all__ = ["main"]

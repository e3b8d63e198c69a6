"""`python -m trifast_inductor bench`: this package beside its peers, in one process, on one set of random inputs."""

from trifast_inductor.bench.command import main

__all__ = ["main"]

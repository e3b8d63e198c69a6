"""Kernels for Hopper alone. `forward.launch` does not choose them yet: docs/benchmarks/log-hopper.md says why."""

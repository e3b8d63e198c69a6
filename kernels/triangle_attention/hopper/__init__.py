"""Kernels for Hopper alone. Nothing chooses them yet: docs/benchmarks/log-hopper.md and log-hopper-dbias.md say why."""

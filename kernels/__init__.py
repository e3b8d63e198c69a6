"""What runs: one directory per operator. Imported as `trifast_inductor.kernels` only."""

if __name__ != "trifast_inductor.kernels":
    raise ImportError(f"import this package as trifast_inductor.kernels, not as {__name__}")

"""What is recognised in a graph. Imported as `trifast_inductor.patterns` only."""

if __name__ != "trifast_inductor.patterns":
    raise ImportError(f"import this package as trifast_inductor.patterns, not as {__name__}")

"""The backward in plain Triton, for any GPU: dq, dk and dv, dbias; one kernel each, or all in one launch."""

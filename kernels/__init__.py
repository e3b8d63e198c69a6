"""What runs: one directory per operator. Imported as `trifast_inductor.kernels` only.

Other packages own the name `kernels`, and libraries probe for it by importing it. A checkout on the path must not
make such a probe fail, so under that name this is an empty package without a version, and nothing can be had of it.
"""

if __name__ != "trifast_inductor.kernels":
    __path__ = []

    def __getattr__(name: str) -> object:
        raise AttributeError(f"{__name__}.{name}: import this package as trifast_inductor.kernels")

"""What is recognised in a graph. Imported as `trifast_inductor.patterns` only.

Other packages own the name `patterns`, and libraries probe for it by importing it. A checkout on the path must not
make such a probe fail, so under that name this is an empty package without a version, and nothing can be had of it.
"""

if __name__ != "trifast_inductor.patterns":
    __path__ = []

    def __getattr__(name: str) -> object:
        raise AttributeError(f"{__name__}.{name}: import this package as trifast_inductor.patterns")

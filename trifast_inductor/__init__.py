"""Fused triangle attention for unmodified PyTorch models.

torch.compile(model, backend="trifast")       # no import needed
trifast_inductor.register()                   # every later torch.compile(model)
trifast_inductor.explain(model, *args)        # what was rewritten, and why the rest was not
trifast_inductor.triangle_attention(q, k, v, bias, mask)
"""

from trifast_inductor.backend import register, unregister
from trifast_inductor.explain import explain
from trifast_inductor.kernels.triangle_attention.call import triangle_attention

__all__ = ["explain", "register", "triangle_attention", "unregister"]
__version__ = "0.1.0"

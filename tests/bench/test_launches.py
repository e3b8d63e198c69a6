"""Reading what inductor generated."""

import torch

from trifast_inductor.bench.launches import called, generated

SOURCE = """
triton_poi_fused_clone_0 = async_compile.triton('triton_poi_fused_clone_0', ...)
class Runner:
    def call(self, args):
        arg0_1, = args
        with torch.cuda._DeviceGuard(0):
            buf0 = empty_strided_cuda((8, 8), (8, 1), torch.bfloat16)
            triton_poi_fused_clone_0.run(arg0_1, buf0, 64, stream=stream0)
            extern_kernels.mm(buf0, arg0_1, out=buf1)
            buf2 = torch.ops.trifast_inductor.triangle_attention.default(buf0, None)
            cpp_fused_add_1(buf2, buf0)
        return (buf2, )
def benchmark_compiled_module(times=10):
    triton_poi_fused_clone_0.run(None)
"""


def test_calls_come_in_order() -> None:
    assert called(SOURCE) == [
        "triton_poi_fused_clone_0",
        "extern_kernels.mm",
        "torch.ops.trifast_inductor.triangle_attention.default",
        "cpp_fused_add_1",
    ]


def test_a_compiled_function_is_read() -> None:
    names = generated(lambda: torch.compile(torch.mm)(torch.ones(4, 4), torch.ones(4, 4)))
    assert names == ["extern_kernels.mm"]

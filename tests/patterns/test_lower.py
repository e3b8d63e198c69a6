"""Traced graphs before and after the pass, pinned: what inductor is given. Dead nodes are left out."""

import torch
from expecttest import TestCase

from trifast_inductor.rewrite import rewrite

from .graphs import captured, outline
from .near_misses import LogitsReturned, QueryOverwritten, Softclamp, TiedOverRows
from .spellings import EinsumHeadsLast, FoldedRows, MatmulInPlace, inputs


class TracedGraphs(TestCase):
    maxDiff = None

    def before_and_after(self, spelling: type) -> tuple[str, str]:
        gm = captured(spelling(), *inputs(spelling))
        before = outline(gm.graph)
        rewrite(gm.graph)
        gm.graph.lint()
        return before, outline(gm.graph)

    def test_matmul_in_place(self) -> None:
        before, after = self.before_and_after(MatmulInPlace)
        self.assertExpectedInline(
            before,
            """\
%0 = layer_norm(arg2, (16,), arg0, arg1, 1e-05) : [2, 12, 12, 16]
%1 = sub(arg3, 1) : [2, 12, 12]
%2 = mul(1000000000.0, %1) : [2, 12, 12]
%3 = getitem(%2, (Ellipsis, slice(None, None, None), None, None, slice(None, None, None))) : [2, 12, 1, 1, 12]
%4 = linear(%0, arg4, None) : [2, 12, 12, 2]
%5 = permute(%4, 0, 3, 1, 2) : [2, 2, 12, 12]
%6 = unsqueeze(%5, -4) : [2, 1, 2, 12, 12]
%7 = linear(%0, arg5, None) : [2, 12, 12, 16]
%8 = view(%7, 2, 12, 12, 2, 8) : [2, 12, 12, 2, 8]
%9 = linear(%0, arg6, None) : [2, 12, 12, 16]
%10 = view(%9, 2, 12, 12, 2, 8) : [2, 12, 12, 2, 8]
%11 = linear(%0, arg7, None) : [2, 12, 12, 16]
%12 = view(%11, 2, 12, 12, 2, 8) : [2, 12, 12, 2, 8]
%13 = transpose(%8, -2, -3) : [2, 12, 2, 12, 8]
%14 = transpose(%10, -2, -3) : [2, 12, 2, 12, 8]
%15 = transpose(%12, -2, -3) : [2, 12, 2, 12, 8]
%16 = itruediv(%13, 2.8284271247461903) : [2, 12, 2, 12, 8]
%17 = permute(%14, 0, 1, 2, 4, 3) : [2, 12, 2, 8, 12]
%18 = matmul(%16, %17) : [2, 12, 2, 12, 12]
%19 = iadd(%18, %3) : [2, 12, 2, 12, 12]
%20 = iadd(%19, %6) : [2, 12, 2, 12, 12]
%21 = softmax(%20, -1) : [2, 12, 2, 12, 12]
%22 = matmul(%21, %15) : [2, 12, 2, 12, 8]
%23 = transpose(%22, -2, -3) : [2, 12, 12, 2, 8]
%24 = reshape(%23, 2, 12, 12, -1) : [2, 12, 12, 16]
%25 = linear(%0, arg8, arg9) : [2, 12, 12, 16]
%26 = sigmoid(%25) : [2, 12, 12, 16]
%27 = mul(%26, %24) : [2, 12, 12, 16]
%28 = linear(%27, arg10, arg11) : [2, 12, 12, 16]""",
        )
        self.assertExpectedInline(
            after,
            """\
%0 = layer_norm(arg2, (16,), arg0, arg1, 1e-05) : [2, 12, 12, 16]
%1 = sub(arg3, 1) : [2, 12, 12]
%2 = mul(1000000000.0, %1) : [2, 12, 12]
%3 = getitem(%2, (Ellipsis, slice(None, None, None), None, None, slice(None, None, None))) : [2, 12, 1, 1, 12]
%4 = linear(%0, arg4, None) : [2, 12, 12, 2]
%5 = permute(%4, 0, 3, 1, 2) : [2, 2, 12, 12]
%6 = unsqueeze(%5, -4) : [2, 1, 2, 12, 12]
%7 = linear(%0, arg5, None) : [2, 12, 12, 16]
%8 = view(%7, 2, 12, 12, 2, 8) : [2, 12, 12, 2, 8]
%9 = linear(%0, arg6, None) : [2, 12, 12, 16]
%10 = view(%9, 2, 12, 12, 2, 8) : [2, 12, 12, 2, 8]
%11 = linear(%0, arg7, None) : [2, 12, 12, 16]
%12 = view(%11, 2, 12, 12, 2, 8) : [2, 12, 12, 2, 8]
%13 = transpose(%8, -2, -3) : [2, 12, 2, 12, 8]
%14 = transpose(%10, -2, -3) : [2, 12, 2, 12, 8]
%15 = transpose(%12, -2, -3) : [2, 12, 2, 12, 8]
%16 = permute(%14, 0, 1, 2, 4, 3) : [2, 12, 2, 8, 12]
%17 = aten.permute.default(%13, [0, 1, 3, 2, 4]) : [2, 12, 12, 2, 8]
%18 = aten.permute.default(%16, [0, 1, 4, 2, 3]) : [2, 12, 12, 2, 8]
%19 = aten.permute.default(%15, [0, 1, 3, 2, 4]) : [2, 12, 12, 2, 8]
%20 = aten.squeeze.dims(%6, [1]) : [2, 2, 12, 12]
%21 = aten.squeeze.dims(%3, [2, 3]) : [2, 12, 12]
%22 = trifast_inductor.triangle_attention.default(%17, %18, %19, %20, %21, None, 0.35355339059327373, 0.0, True)
%23 = getitem(%22, 0) : [2, 12, 12, 2, 8]
%24 = aten.permute.default(%23, [0, 1, 3, 2, 4]) : [2, 12, 2, 12, 8]
%25 = transpose(%24, -2, -3) : [2, 12, 12, 2, 8]
%26 = reshape(%25, 2, 12, 12, -1) : [2, 12, 12, 16]
%27 = linear(%0, arg8, arg9) : [2, 12, 12, 16]
%28 = sigmoid(%27) : [2, 12, 12, 16]
%29 = mul(%28, %26) : [2, 12, 12, 16]
%30 = linear(%29, arg10, arg11) : [2, 12, 12, 16]""",
        )

    def test_einsum_heads_last(self) -> None:
        before, after = self.before_and_after(EinsumHeadsLast)
        self.assertExpectedInline(
            before,
            """\
%0 = linear(arg0, arg1, None) : [2, 12, 12, 16]
%1 = view(%0, 2, 12, 12, 2, 8) : [2, 12, 12, 2, 8]
%2 = linear(arg0, arg2, None) : [2, 12, 12, 16]
%3 = view(%2, 2, 12, 12, 2, 8) : [2, 12, 12, 2, 8]
%4 = linear(arg0, arg3, None) : [2, 12, 12, 16]
%5 = view(%4, 2, 12, 12, 2, 8) : [2, 12, 12, 2, 8]
%6 = einsum('bijhd,bikhd->bijkh', %1, %3) : [2, 12, 12, 12, 2]
%7 = mul(%6, 0.3535533905932738) : [2, 12, 12, 12, 2]
%8 = linear(arg0, arg4, None) : [2, 12, 12, 2]
%9 = unsqueeze(%8, 1) : [2, 1, 12, 12, 2]
%10 = add(%7, %9) : [2, 12, 12, 12, 2]
%11 = getitem(arg5, (slice(None, None, None), slice(None, None, None), None, slice(None, None, None), None)) : [2, 12, 1, 12, 1]
%12 = invert(%11) : [2, 12, 1, 12, 1]
%13 = masked_fill(%10, %12, -1000000000.0) : [2, 12, 12, 12, 2]
%14 = float(%13) : [2, 12, 12, 12, 2]
%15 = softmax(%14, dim=-2) : [2, 12, 12, 12, 2]
%16 = to(%15, torch.float32) : [2, 12, 12, 12, 2]
%17 = einsum('bijkh,bikhd->bijhd', %16, %5) : [2, 12, 12, 2, 8]
%18 = flatten(%17, -2) : [2, 12, 12, 16]
%19 = linear(arg0, arg6, arg7) : [2, 12, 12, 16]
%20 = sigmoid(%19) : [2, 12, 12, 16]
%21 = mul(%20, %18) : [2, 12, 12, 16]
%22 = linear(%21, arg8, arg9) : [2, 12, 12, 16]""",
        )
        self.assertExpectedInline(
            after,
            """\
%0 = linear(arg0, arg1, None) : [2, 12, 12, 16]
%1 = view(%0, 2, 12, 12, 2, 8) : [2, 12, 12, 2, 8]
%2 = linear(arg0, arg2, None) : [2, 12, 12, 16]
%3 = view(%2, 2, 12, 12, 2, 8) : [2, 12, 12, 2, 8]
%4 = linear(arg0, arg3, None) : [2, 12, 12, 16]
%5 = view(%4, 2, 12, 12, 2, 8) : [2, 12, 12, 2, 8]
%6 = linear(arg0, arg4, None) : [2, 12, 12, 2]
%7 = unsqueeze(%6, 1) : [2, 1, 12, 12, 2]
%8 = getitem(arg5, (slice(None, None, None), slice(None, None, None), None, slice(None, None, None), None)) : [2, 12, 1, 12, 1]
%9 = invert(%8) : [2, 12, 1, 12, 1]
%10 = aten.squeeze.dims(%7, [1]) : [2, 12, 12, 2]
%11 = aten.permute.default(%10, [0, 3, 1, 2]) : [2, 2, 12, 12]
%12 = aten.squeeze.dims(%9, [2, 4]) : [2, 12, 12]
%13 = trifast_inductor.triangle_attention.default(%1, %3, %5, %11, None, %12, 0.3535533905932738, -1000000000.0, False)
%14 = getitem(%13, 0) : [2, 12, 12, 2, 8]
%15 = flatten(%14, -2) : [2, 12, 12, 16]
%16 = linear(arg0, arg6, arg7) : [2, 12, 12, 16]
%17 = sigmoid(%16) : [2, 12, 12, 16]
%18 = mul(%17, %15) : [2, 12, 12, 16]
%19 = linear(%18, arg8, arg9) : [2, 12, 12, 16]""",
        )

    def test_rows_folded_and_bias_repeated(self) -> None:
        before, after = self.before_and_after(FoldedRows)
        self.assertExpectedInline(
            before,
            """\
%0 = linear(arg0, arg1, None) : [2, 12, 12, 2]
%1 = permute(%0, 0, 3, 1, 2) : [2, 2, 12, 12]
%2 = unsqueeze(%1, 1) : [2, 1, 2, 12, 12]
%3 = expand(%2, 2, 12, 2, 12, 12) : [2, 12, 2, 12, 12]
%4 = reshape(%3, 24, 2, 12, 12) : [24, 2, 12, 12]
%5 = reshape(arg0, 24, 12, 16) : [24, 12, 16]
%6 = linear(%5, arg2, None) : [24, 12, 16]
%7 = view(%6, 24, 12, 2, 8) : [24, 12, 2, 8]
%8 = transpose(%7, 1, 2) : [24, 2, 12, 8]
%9 = linear(%5, arg3, None) : [24, 12, 16]
%10 = view(%9, 24, 12, 2, 8) : [24, 12, 2, 8]
%11 = transpose(%10, 1, 2) : [24, 2, 12, 8]
%12 = linear(%5, arg4, None) : [24, 12, 16]
%13 = view(%12, 24, 12, 2, 8) : [24, 12, 2, 8]
%14 = transpose(%13, 1, 2) : [24, 2, 12, 8]
%15 = mul(%8, 0.3535533905932738) : [24, 2, 12, 8]
%16 = einsum('bhid,bhjd->bhij', %15, %11) : [24, 2, 12, 12]
%17 = add(%16, %4) : [24, 2, 12, 12]
%18 = reshape(arg5, 24, 1, 1, 12) : [24, 1, 1, 12]
%19 = invert(%18) : [24, 1, 1, 12]
%20 = masked_fill(%17, %19, -3.4028234663852886e+38) : [24, 2, 12, 12]
%21 = softmax(%20, -1) : [24, 2, 12, 12]
%22 = einsum('bhij,bhjd->bhid', %21, %14) : [24, 2, 12, 8]
%23 = transpose(%22, 1, 2) : [24, 12, 2, 8]
%24 = reshape(%23, 2, 12, 12, 16) : [2, 12, 12, 16]
%25 = linear(arg0, arg6, arg7) : [2, 12, 12, 16]
%26 = sigmoid(%25) : [2, 12, 12, 16]
%27 = mul(%26, %24) : [2, 12, 12, 16]
%28 = linear(%27, arg8, arg9) : [2, 12, 12, 16]""",
        )
        self.assertExpectedInline(
            after,
            """\
%0 = linear(arg0, arg1, None) : [2, 12, 12, 2]
%1 = permute(%0, 0, 3, 1, 2) : [2, 2, 12, 12]
%2 = unsqueeze(%1, 1) : [2, 1, 2, 12, 12]
%3 = reshape(arg0, 24, 12, 16) : [24, 12, 16]
%4 = linear(%3, arg2, None) : [24, 12, 16]
%5 = view(%4, 24, 12, 2, 8) : [24, 12, 2, 8]
%6 = transpose(%5, 1, 2) : [24, 2, 12, 8]
%7 = linear(%3, arg3, None) : [24, 12, 16]
%8 = view(%7, 24, 12, 2, 8) : [24, 12, 2, 8]
%9 = transpose(%8, 1, 2) : [24, 2, 12, 8]
%10 = linear(%3, arg4, None) : [24, 12, 16]
%11 = view(%10, 24, 12, 2, 8) : [24, 12, 2, 8]
%12 = transpose(%11, 1, 2) : [24, 2, 12, 8]
%13 = reshape(arg5, 24, 1, 1, 12) : [24, 1, 1, 12]
%14 = invert(%13) : [24, 1, 1, 12]
%15 = aten.view.default(%6, [2, 12, 2, 12, 8]) : [2, 12, 2, 12, 8]
%16 = aten.permute.default(%15, [0, 1, 3, 2, 4]) : [2, 12, 12, 2, 8]
%17 = aten.view.default(%9, [2, 12, 2, 12, 8]) : [2, 12, 2, 12, 8]
%18 = aten.permute.default(%17, [0, 1, 3, 2, 4]) : [2, 12, 12, 2, 8]
%19 = aten.view.default(%12, [2, 12, 2, 12, 8]) : [2, 12, 2, 12, 8]
%20 = aten.permute.default(%19, [0, 1, 3, 2, 4]) : [2, 12, 12, 2, 8]
%21 = aten.squeeze.dims(%2, [1]) : [2, 2, 12, 12]
%22 = aten.view.default(%14, [2, 12, 12]) : [2, 12, 12]
%23 = trifast_inductor.triangle_attention.default(%16, %18, %20, %21, None, %22, 0.3535533905932738, -3.4028234663852886e+38, False)
%24 = getitem(%23, 0) : [2, 12, 12, 2, 8]
%25 = aten.permute.default(%24, [0, 1, 3, 2, 4]) : [2, 12, 2, 12, 8]
%26 = aten.reshape.default(%25, [24, 2, 12, 8]) : [24, 2, 12, 8]
%27 = transpose(%26, 1, 2) : [24, 12, 2, 8]
%28 = reshape(%27, 2, 12, 12, 16) : [2, 12, 12, 16]
%29 = linear(arg0, arg6, arg7) : [2, 12, 12, 16]
%30 = sigmoid(%29) : [2, 12, 12, 16]
%31 = mul(%30, %28) : [2, 12, 12, 16]
%32 = linear(%31, arg8, arg9) : [2, 12, 12, 16]""",
        )

    def test_pre_dispatch_aten(self) -> None:
        """What torch.export hands to AOTInductor: ATen calls with `val` instead of `example_value`."""
        with torch.no_grad():
            graph = torch.export.export(MatmulInPlace(), inputs(MatmulInPlace)).graph
        self.assertExpectedInline(
            outline(graph),
            """\
%0 = aten.layer_norm.default(arg10, [16], arg0, arg1, 1e-05, False) : [2, 12, 12, 16]
%1 = aten.sub.Tensor(arg11, 1) : [2, 12, 12]
%2 = aten.mul.Tensor(%1, 1000000000.0) : [2, 12, 12]
%3 = aten.unsqueeze.default(%2, 2) : [2, 12, 1, 12]
%4 = aten.unsqueeze.default(%3, 3) : [2, 12, 1, 1, 12]
%5 = aten.linear.default(%0, arg2) : [2, 12, 12, 2]
%6 = aten.permute.default(%5, [0, 3, 1, 2]) : [2, 2, 12, 12]
%7 = aten.unsqueeze.default(%6, -4) : [2, 1, 2, 12, 12]
%8 = aten.linear.default(%0, arg3) : [2, 12, 12, 16]
%9 = aten.view.default(%8, [2, 12, 12, 2, 8]) : [2, 12, 12, 2, 8]
%10 = aten.linear.default(%0, arg4) : [2, 12, 12, 16]
%11 = aten.view.default(%10, [2, 12, 12, 2, 8]) : [2, 12, 12, 2, 8]
%12 = aten.linear.default(%0, arg5) : [2, 12, 12, 16]
%13 = aten.view.default(%12, [2, 12, 12, 2, 8]) : [2, 12, 12, 2, 8]
%14 = aten.transpose.int(%9, -2, -3) : [2, 12, 2, 12, 8]
%15 = aten.transpose.int(%11, -2, -3) : [2, 12, 2, 12, 8]
%16 = aten.transpose.int(%13, -2, -3) : [2, 12, 2, 12, 8]
%17 = aten.div_.Tensor(%14, 2.8284271247461903) : [2, 12, 2, 12, 8]
%18 = aten.permute.default(%15, [0, 1, 2, 4, 3]) : [2, 12, 2, 8, 12]
%19 = aten.matmul.default(%17, %18) : [2, 12, 2, 12, 12]
%20 = aten.add_.Tensor(%19, %4) : [2, 12, 2, 12, 12]
%21 = aten.add_.Tensor(%20, %7) : [2, 12, 2, 12, 12]
%22 = aten.softmax.int(%21, -1) : [2, 12, 2, 12, 12]
%23 = aten.matmul.default(%22, %16) : [2, 12, 2, 12, 8]
%24 = aten.transpose.int(%23, -2, -3) : [2, 12, 12, 2, 8]
%25 = aten.reshape.default(%24, [2, 12, 12, -1]) : [2, 12, 12, 16]
%26 = aten.linear.default(%0, arg6, arg7) : [2, 12, 12, 16]
%27 = aten.sigmoid.default(%26) : [2, 12, 12, 16]
%28 = aten.mul.Tensor(%27, %25) : [2, 12, 12, 16]
%29 = aten.linear.default(%28, arg8, arg9) : [2, 12, 12, 16]""",
        )
        rewrite(graph)
        graph.lint()
        self.assertExpectedInline(
            outline(graph),
            """\
%0 = aten.layer_norm.default(arg10, [16], arg0, arg1, 1e-05, False) : [2, 12, 12, 16]
%1 = aten.sub.Tensor(arg11, 1) : [2, 12, 12]
%2 = aten.mul.Tensor(%1, 1000000000.0) : [2, 12, 12]
%3 = aten.unsqueeze.default(%2, 2) : [2, 12, 1, 12]
%4 = aten.unsqueeze.default(%3, 3) : [2, 12, 1, 1, 12]
%5 = aten.linear.default(%0, arg2) : [2, 12, 12, 2]
%6 = aten.permute.default(%5, [0, 3, 1, 2]) : [2, 2, 12, 12]
%7 = aten.unsqueeze.default(%6, -4) : [2, 1, 2, 12, 12]
%8 = aten.linear.default(%0, arg3) : [2, 12, 12, 16]
%9 = aten.view.default(%8, [2, 12, 12, 2, 8]) : [2, 12, 12, 2, 8]
%10 = aten.linear.default(%0, arg4) : [2, 12, 12, 16]
%11 = aten.view.default(%10, [2, 12, 12, 2, 8]) : [2, 12, 12, 2, 8]
%12 = aten.linear.default(%0, arg5) : [2, 12, 12, 16]
%13 = aten.view.default(%12, [2, 12, 12, 2, 8]) : [2, 12, 12, 2, 8]
%14 = aten.transpose.int(%9, -2, -3) : [2, 12, 2, 12, 8]
%15 = aten.transpose.int(%11, -2, -3) : [2, 12, 2, 12, 8]
%16 = aten.transpose.int(%13, -2, -3) : [2, 12, 2, 12, 8]
%17 = aten.permute.default(%15, [0, 1, 2, 4, 3]) : [2, 12, 2, 8, 12]
%18 = aten.permute.default(%14, [0, 1, 3, 2, 4]) : [2, 12, 12, 2, 8]
%19 = aten.permute.default(%17, [0, 1, 4, 2, 3]) : [2, 12, 12, 2, 8]
%20 = aten.permute.default(%16, [0, 1, 3, 2, 4]) : [2, 12, 12, 2, 8]
%21 = aten.squeeze.dims(%7, [1]) : [2, 2, 12, 12]
%22 = aten.squeeze.dims(%4, [2, 3]) : [2, 12, 12]
%23 = trifast_inductor.triangle_attention.default(%18, %19, %20, %21, %22, None, 0.35355339059327373, 0.0, True)
%24 = getitem(%23, 0) : [2, 12, 12, 2, 8]
%25 = aten.permute.default(%24, [0, 1, 3, 2, 4]) : [2, 12, 2, 12, 8]
%26 = aten.transpose.int(%25, -2, -3) : [2, 12, 12, 2, 8]
%27 = aten.reshape.default(%26, [2, 12, 12, -1]) : [2, 12, 12, 16]
%28 = aten.linear.default(%0, arg6, arg7) : [2, 12, 12, 16]
%29 = aten.sigmoid.default(%28) : [2, 12, 12, 16]
%30 = aten.mul.Tensor(%29, %27) : [2, 12, 12, 16]
%31 = aten.linear.default(%30, arg8, arg9) : [2, 12, 12, 16]""",
        )

    def test_a_graph_rewritten_once_is_not_rewritten_again(self) -> None:
        """Dynamo restarts some compiles, and the dead chain is still there."""
        gm = captured(MatmulInPlace(), *inputs(MatmulInPlace))
        rewrite(gm.graph)
        after = outline(gm.graph)
        self.assertEqual(rewrite(gm.graph), [])
        self.assertEqual(outline(gm.graph), after)

    def test_near_misses_stay_untouched(self) -> None:
        for near_miss in (Softclamp, TiedOverRows, LogitsReturned, QueryOverwritten):
            with self.subTest(near_miss.__name__), torch.set_grad_enabled(near_miss.trains):
                gm = captured(near_miss(), *inputs(near_miss))
                before = str(gm.graph)
                self.assertEqual([row.rewritten for row in rewrite(gm.graph)], [False])
                self.assertEqual(str(gm.graph), before)

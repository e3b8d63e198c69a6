"""Gradient modes, autocast, checkpoints, shared regions, branches and graph breaks around the attention."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .block import Around, Block, assert_agrees, core, core_with_softmax_in_float32, inputs, results

bfloat16 = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)


class TestGradientModes:
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_outside(self, mode):
        assert_agrees(Block(), context=mode)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_inside(self, mode):
        if mode is torch.inference_mode and torch.__version__.startswith("2.11"):
            pytest.skip("torch 2.11's own aot_eager fails on inference_mode inside a graph")

        def frozen(block, x, mask):
            with mode():
                y = block(x, mask)
            return y * 2

        assert_agrees(Around(frozen), context=torch.no_grad if mode is torch.inference_mode else torch.enable_grad)


class TestAutocast:
    @pytest.mark.parametrize("of_core", [core, core_with_softmax_in_float32])
    def test_outside(self, of_core):
        assert_agrees(Block(of_core), context=bfloat16)

    def test_inside(self):
        def lower(block, x, mask):
            with bfloat16():
                return block(x, mask)

        assert_agrees(Around(lower, Block(core_with_softmax_in_float32)))


class TestCheckpoint:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_around_the_block(self, use_reentrant):
        assert_agrees(Around(lambda block, *args: checkpoint(block, *args, use_reentrant=use_reentrant)))

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_around_the_core(self, use_reentrant):
        assert_agrees(Block(lambda *args: checkpoint(core, *args, use_reentrant=use_reentrant)))

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_around_what_is_compiled(self, use_reentrant):
        """The checkpoint's hooks see what the program saves, and nothing of what the pass runs while compiling.

        With `use_reentrant` the first run is without gradients, so there are two graphs.
        """
        model = Block()
        compiled = torch.compile(model, backend="trifast")
        around = Around(lambda block, *args: checkpoint(block, *args, use_reentrant=use_reentrant), compiled)
        assert_agrees(model, compiled=around, rewritten=2 if use_reentrant else 1)

    @pytest.mark.parametrize("saved", [True, False], ids=["saved", "recomputed"])
    def test_a_policy_for_the_op(self, saved):
        """A policy sees what lies below autograd, as with torch's own; saved, the forward runs once, and else twice."""

        def policy(context, op, *args, **kwargs):
            if op is torch.ops.trifast_inductor.triangle_attention_forward.default and saved:
                return CheckpointPolicy.MUST_SAVE
            return CheckpointPolicy.PREFER_RECOMPUTE

        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        model = Around(lambda block, *args: checkpoint(block, *args, use_reentrant=False, context_fn=contexts))
        compiled = torch.compile(model, backend="trifast")
        assert_agrees(model, compiled=compiled)
        with torch.profiler.profile() as profile:
            results(compiled, *inputs())
        calls = {event.key: event.count for event in profile.key_averages()}
        assert calls["trifast_inductor::triangle_attention_forward"] == (1 if saved else 2)

    def test_a_policy_that_does_not_know_the_op(self):
        contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
        assert_agrees(Around(lambda block, *args: checkpoint(block, *args, use_reentrant=False, context_fn=contexts)))


class TestBodies:
    def test_a_region_compiled_once_for_two_blocks(self):
        shared = torch.compiler.nested_compile_region(lambda block, x, mask: block(x, mask))

        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = Block(), Block()

            def forward(self, x, mask):
                return shared(self.second, shared(self.first, x, mask), mask)

        assert_agrees(Two(), rewritten=1)

    def test_both_branches_of_cond(self):
        def either(block, x, mask):
            return torch.cond(x.sum() > 0, lambda x: block(x, mask), lambda x: 2 * block(x, mask), (x,))

        assert_agrees(Around(either), context=torch.no_grad, rewritten=2)

    def test_graph_breaks_before_and_after(self):
        def broken(block, x, mask):
            x = x * 2
            torch._dynamo.graph_break()
            y = block(x, mask)
            torch._dynamo.graph_break()
            return x + y

        assert_agrees(Around(broken))

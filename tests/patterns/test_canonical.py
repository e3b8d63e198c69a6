"""The reading: versions of tensors, liveness, what cannot be re-run, autocast."""

import torch

from trifast_inductor.patterns import canonical, nodes
from trifast_inductor.patterns.axes import aten, packet
from trifast_inductor.patterns.recording import Value

from .graphs import captured


def read(function, *args):
    gm = captured(function, *args)
    return gm, canonical.read(gm.graph)


def node(gm, name):
    return next(n for n in gm.graph.nodes if n.name == name)


def test_products_are_one_op_however_spelled() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    kinds = []
    for product in (
        lambda a, b: a @ b.mT,
        lambda a, b: torch.einsum("bic,bjc->bij", a, b),
        lambda a, b: torch.matmul(a, b.permute(0, 2, 1)),
        lambda a, b: torch.bmm(a, torch.swapaxes(b, -1, -2)),
    ):
        _, reading = read(product, a, b)
        live = [packet(op) for op in reading.ops if op.is_live]
        kinds.append([kind for kind in live if kind in (aten.bmm, aten.matmul)])
    assert kinds == [[aten.matmul], [aten.bmm], [aten.matmul], [aten.bmm]]


def test_a_write_makes_new_versions_of_every_alias() -> None:
    def f(x):
        y = x * 2
        alias = y.view(-1)
        y += 1
        return alias * 3

    gm, reading = read(f, torch.randn(4, 4))
    product = reading.outputs_of[node(gm, "mul_1")]
    assert product.op.inputs[0].op.target == "reread after a write"
    assert reading.writes


def test_dead_ops_are_not_live_and_writes_to_inputs_are() -> None:
    def f(x, buffer):
        dead = x.sin()
        buffer.add_(x.cos())
        return x + 1, dead.shape[0]

    _, reading = read(f, torch.randn(3), torch.zeros(3))
    live = {packet(op) for op in reading.ops if op.is_live}
    assert aten.cos in live
    assert aten.sin not in live


def test_autocast_regions_become_casts_and_leave_no_trace() -> None:
    def f(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x

    gm, reading = read(f, torch.randn(4, 4))
    assert reading.outputs_of[node(gm, "matmul")].dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_what_cannot_be_rerun_is_an_input_that_may_have_been_written() -> None:
    def f(x):
        y = torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)
        return y + x

    gm, reading = read(f, torch.randn(4, requires_grad=True))
    assert [n.op for n in reading.unread] == ["call_function"]
    x = next(n for n in gm.graph.nodes if n.op == "placeholder")
    assert reading.written_between(reading.outputs_of[x], 0, 10**6)


def test_a_tensor_that_changes_its_shape_in_place_is_run_again() -> None:
    """The tracer recorded it with the shape that it has at the end."""

    def f(x, w):
        y = torch.nn.functional.linear(x, w) * 2
        y.transpose_(1, 2)
        return y + 1

    gm, reading = read(f, torch.randn(2, 3, 4), torch.randn(5, 4))
    assert reading.outputs_of[node(gm, "y")].shape == (2, 3, 5)
    assert reading.outputs_of[node(gm, "add")].shape == (2, 5, 3)
    (linear,) = (op for op in reading.ops if packet(op) is aten.linear)
    assert linear.outputs[0].shape == (2, 3, 5)


def test_two_nodes_with_one_recorded_result_are_two_values() -> None:
    """As where a pass of the user's copied a node's meta."""
    gm = captured(lambda x: (x * 2, x * 3), torch.randn(4))
    twice, thrice = node(gm, "mul"), node(gm, "mul_1")
    thrice.meta = dict(twice.meta)
    reading = canonical.read(gm.graph)
    assert reading.outputs_of[twice].op.args[1] == 2
    assert reading.outputs_of[thrice].op.args[1] == 3
    assert reading.outputs_of[twice].tensor is not reading.outputs_of[thrice].tensor


def test_an_old_call_with_a_factor_is_no_plain_sum() -> None:
    _, reading = read(lambda x, y: torch.add(x, 2, y), torch.randn(4), torch.randn(4))
    (sum_,) = (op for op in reading.ops if packet(op) is aten.add)
    assert (sum_.args[1].shape, sum_.kwargs) == ((4,), {"alpha": 2})


def test_only_torchs_own_functions_are_taken_for_plain_ops() -> None:
    """A function of the user's that Dynamo may call may have any name."""

    @torch._dynamo.allow_in_graph
    def add(x, y):
        return x * y

    _, reading = read(lambda x: add(x, x), torch.randn(4))
    assert [packet(op) for op in reading.ops] == [aten.mul]


def test_views_taken_as_recorded_are_those_that_run(monkeypatch) -> None:
    """Each from a sum that is taken as recorded, and from one that was run again, as a slice always is."""

    def f(x):
        for y in (x + 1, (x + 1)[:, 0:3]):
            yield y.transpose(1, -1) * 2, torch.transpose(y, 0, 2) * 2
            yield y.permute(0, 2, 1) * 2, y.permute((2, 1, 0)) * 2, torch.permute(y, (1, 0, -1)) * 2
            yield y.unsqueeze(-1) * 2, torch.unsqueeze(y, 1) * 2
            yield y.flatten(1) * 2, torch.flatten(y, 0, 1) * 2, y.transpose(0, 1).flatten(1) * 2
            yield y.unflatten(-1, (2, -1)) * 2, y.reshape(y.shape[0], -1) * 2, torch.reshape(y, (-1,)) * 2
            yield y.unflatten(-1, (2, 2)).transpose(1, 2).reshape(2, -1, 2) * 2, y.view(-1) * 2

    def calls(reading):
        numbers = {value: n for n, value in enumerate(value for op in reading.ops for value in op.outputs)}
        return [
            (op.target, [numbers.get(x, x.shape) if isinstance(x, Value) else x for x in op.args], op.outputs[0].shape)
            for op in reading.ops
        ]

    gm = captured(lambda x: list(f(x)), torch.randn(2, 3, 4))
    taken = []
    view = nodes.view_call
    monkeypatch.setattr(nodes, "view_call", lambda *given: taken.append(view(*given)) or taken[-1])
    as_recorded = calls(canonical.read(gm.graph))
    assert sum(call is not None for call in taken) > 12
    monkeypatch.setattr(nodes, "view_call", lambda *given: None)
    run_again = calls(canonical.read(gm.graph))
    for ours, theirs in zip(as_recorded, run_again, strict=True):
        if ours[0] is aten.view.default:  # sizes may be spelled as -1
            assert theirs[0] in (aten.view.default, aten._unsafe_view.default)
            assert (ours[1][0], ours[2]) == (theirs[1][0], theirs[2])
        else:
            assert ours == theirs

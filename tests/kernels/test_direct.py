"""Launches past Triton's launcher: the driver gets what Triton compiled for, and nothing where that is not certain."""

import ctypes
import struct
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from trifast_inductor.testing import random_inputs

pytest.importorskip("triton")
from trifast_inductor.kernels.triangle_attention import backward, direct, forward, launching
from trifast_inductor.static.recording import launches_for

KINDS = {"x_ptr": "*bf16", "none_ptr": "constexpr", "y_ptr": "*fp32", "n": "i32", "step": "i64", "scale": "fp32"}
VALUES = {"n": -7, "step": 1 << 40, "scale": 0.5, "BLOCK": 64}
SIZES = [8, 8, 4, 8, 4, 8, 8]


class FakeDriver:
    """Reads what it is given as libcuda does, while the call lasts."""

    def __init__(self, error=0):
        self.error, self.seen = error, []

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        config = config._obj
        read = [ctypes.string_at(at, size) for at, size in zip(parameters, SIZES, strict=True)]
        attributes = [(a.id, a.value) for a in config.attributes[: config.attributes_count]]
        launch = (tuple(config.grid), tuple(config.block), config.shared_bytes, config.stream, attributes)
        self.seen.append((function.value, launch, read, threading.get_ident()))
        return self.error

    def cuTensorMapReplaceAddress(self, tensor_map, address):
        raise AssertionError("no tensor is walked here")

    def cuGetErrorString(self, code, text):
        text._obj.value = b"out of luck"


def compiled(sizes=SIZES, **changes):
    metadata = {"num_warps": 4, "shared": 1024, "num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": True}
    metadata |= {"global_scratch_size": 0, "profile_scratch_size": 0, "name": "kernel", **changes}
    declared = ",\n".join(f"\t.param .u{8 * size} kernel_param_{n}" for n, size in enumerate(sizes))
    ptx = f".visible .entry kernel(\n{declared}\n)\n.reqntid 128"
    return SimpleNamespace(function=99, metadata=SimpleNamespace(**metadata), asm={"ptx": ptx})


def kernel(driver, kinds=KINDS, **changes):
    with mock.patch.object(direct, "_driver", return_value=driver):
        return direct.kernel(compiled(**changes), (5, 1, 1), kinds | {"BLOCK": "constexpr"}, VALUES, [], [0, 0])


def launcher(driver, **changes):
    with mock.patch.object(direct, "_driver", return_value=driver):
        return direct.launcher([(kernel(driver, **changes), (0, 1))], 2)


@pytest.mark.parametrize("dependent", [True, False])
def test_the_driver_reads_what_the_kernel_was_compiled_for(dependent):
    driver = FakeDriver()
    run = launcher(driver, launch_pdl=dependent)
    run([0xABC0, 0xDEF0], 77)
    run([0x1230, 0x4560], 78)
    numbers = [struct.pack("<i", -7), struct.pack("<q", 1 << 40), struct.pack("<f", 0.5), bytes(8), bytes(8)]
    for (x, y, stream), (function, launch, read, _) in zip(
        ((0xABC0, 0xDEF0, 77), (0x1230, 0x4560, 78)), driver.seen, strict=True
    ):
        assert function == 99
        assert launch == ((5, 1, 1), (128, 1, 1), 1024, stream, [(6, 1)] if dependent else [])
        assert read == [struct.pack("<Q", x), struct.pack("<Q", y), *numbers]


def test_kernels_are_launched_in_order_each_on_its_tensors():
    driver = FakeDriver()
    first, second = kernel(driver), kernel(driver, launch_pdl=False)
    with mock.patch.object(direct, "_driver", return_value=driver):
        run = direct.launcher([(first, (0, 2)), (second, (3, 1))], 4)
    run([16, 32, 48, 64], 7)
    run([80, 96, 112, 128], 8)
    read = [[struct.unpack("<Q", one)[0] for one in parameters[:2]] for _, _, parameters, _ in driver.seen]
    assert read == [[16, 48], [64, 32], [80, 112], [128, 96]]
    assert [(launch[3], len(launch[4])) for _, launch, _, _ in driver.seen] == [(7, 1), (7, 0), (8, 1), (8, 0)]
    numbers = [struct.pack("<i", -7), struct.pack("<q", 1 << 40), struct.pack("<f", 0.5), bytes(8), bytes(8)]
    assert all(parameters[2:] == numbers for _, _, parameters, _ in driver.seen)


def test_threads_do_not_share_what_the_driver_reads():
    driver = FakeDriver()
    run = launcher(driver)
    meet = threading.Barrier(2)
    inside = driver.cuLaunchKernelEx

    def slow(*given):
        meet.wait()  # both have written their addresses
        return inside(*given)

    driver.cuLaunchKernelEx = slow
    run = launcher(driver)
    threads = [threading.Thread(target=run, args=([n, n], n)) for n in (16, 32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {(launch[3], read[0]) for _, launch, read, _ in driver.seen} == {
        (16, struct.pack("<Q", 16)),
        (32, struct.pack("<Q", 32)),
    }


def test_a_failed_launch_is_named():
    with pytest.raises(RuntimeError, match=r"could not launch kernel: out of luck \(CUresult 2\)"):
        launcher(FakeDriver(error=2))([16, 32], 0)


@pytest.mark.parametrize(
    ("driver", "changes"),
    [
        (None, {}),
        (FakeDriver(), {"sizes": SIZES[:-1]}),
        (FakeDriver(), {"sizes": [*SIZES, 8]}),
        (FakeDriver(), {"sizes": [8, 8, 8, 8, 4, 8, 8]}),
        (FakeDriver(), {"num_ctas": 2}),
        (FakeDriver(), {"global_scratch_size": 16}),
        (FakeDriver(), {"profile_scratch_size": 16}),
        (FakeDriver(), {"launch_cooperative_grid": True}),
        (FakeDriver(), {"kinds": {**KINDS, "flag": "i1"}}),
    ],
)
def test_triton_launches_what_is_not_certain(driver, changes):
    assert kernel(driver, **changes) is None


def test_no_driver_where_there_is_none():
    direct._driver.cache_clear()
    with mock.patch.object(ctypes, "CDLL", side_effect=OSError("no libcuda.so.1")):
        assert direct._driver() is None
    direct._driver.cache_clear()


def test_every_kernel_has_the_parameters_that_are_laid_out():
    with launches_for("sm_90") as launches:
        for N in (60, 100, 256):
            x = random_inputs(R=N, I=N, J=N, H=4, D=32, dtype=torch.bfloat16, key_term="additive")
            saved = forward.portable(*x.op)
            backward.launch(x.grad_out, *x.op[:6], *saved, *x.op[6:], True)
    assert len({launch.name for launch in launches}) >= 9
    for launch in launches:
        kinds = launch.compiled.src.signature
        sizes = [struct.calcsize(p.form) for p in direct.layout(kinds, dict.fromkeys(kinds, 0), [])]
        assert direct.parameter_sizes(launch.compiled.asm["ptx"]) == sizes, launch.name


def test_what_the_copy_engine_walks_is_given_by_value_with_its_lengths_and_strides():
    kinds = {"x_desc": "tensordesc<bf16[64, 16], layout>", "y_ptr": "*fp32", "n": "i32"}
    laid_out = direct.layout(kinds, {"n": 3}, [([256, 16], [16, 1])])
    assert [(p.form, p.tensor) for p in laid_out[:2]] == [("128s", 0), ("i", None)]
    assert [p.tensor for p in laid_out if p.tensor is not None] == [0, 1]
    declared = [
        ".align 64 .b8 p_0[128]",
        ".u32 p_1",
        ".u32 p_2",
        ".u64 p_3",
        ".u64 p_4",
        ".u64 .ptr .global .align 1 p_5",
    ]
    declared += [".u32 p_6", ".u64 .ptr .global .align 1 p_7", ".u64 .ptr .global .align 1 p_8"]
    ptx = ".visible .entry f(\n" + ",\n".join(f"\t.param {one}" for one in declared) + "\n)\n.maxnreg 168\n{"
    assert direct.parameter_sizes(ptx) == [struct.calcsize(p.form) for p in laid_out]


META = {"swizzle": 1, "elem_size": 2, "elem_type": 10, "block_size": [64, 16], "fp4_padded": False}


def encoded(meta, error=0):
    """What the driver is asked to encode of 256 rows of 16 bfloat16 that lie 24 apart."""
    asked = []

    def encode(tensor_map, kind, rank, address, lengths, steps, box, element_steps, *rest):
        assert tensor_map.value % 64 == 0
        ctypes.memmove(tensor_map.value, bytes(range(128)), 128)
        numbers = [list(lengths), list(steps)[:-1], list(box), list(element_steps)]
        asked.append((kind.value, rank.value, address.value, *numbers, *(one.value for one in rest)))
        return error

    driver = SimpleNamespace(cuTensorMapEncodeTiled=encode)
    return asked, direct._encoded(driver, ([256, 16], [24, 1]), meta, 0x7F00)


def test_a_tensor_is_described_innermost_first_and_in_bytes():
    asked, made = encoded(META)
    bfloat16, tile_of_32_bytes, promotion = 9, 1, 2
    assert asked == [(bfloat16, 2, 0x7F00, [16, 256], [48], [16, 64], [1, 1], 0, tile_of_32_bytes, promotion, 0)]
    assert made == bytes(range(128))


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {**META, "elem_type": "bfloat16"},
        {**META, "fp4_padded": True},
        {**META, "is_im2col": True},
        {**META, "block_size": [64]},
    ],
)
def test_triton_describes_what_is_not_known(meta):
    assert encoded(meta) == ([], None)


def test_triton_describes_what_the_driver_does_not_take():
    assert encoded(META, error=1)[1] is None


def test_the_driver_reads_a_tensor_map_of_the_tensor_at_hand():
    kinds = {"x_ptr": "*bf16", "y_desc": "tensordesc<bf16[64, 16], layout>", "z_ptr": "*fp32", "n": "i32"}
    sizes = [8, 128, 4, 4, 8, 8, 8, 4, 8, 8]
    seen, replaced = [], []

    def encode(tensor_map, *_):
        ctypes.memmove(tensor_map.value, bytes(range(128)), 128)
        return 0

    def replace_address(tensor_map, address):
        replaced.append(address.value)
        ctypes.memmove(tensor_map.value, struct.pack("<Q", address.value), 8)
        return 0

    def launch(config, function, parameters, extra):
        assert parameters[1] % 64 == 0
        seen.append([ctypes.string_at(at, size) for at, size in zip(parameters, sizes, strict=True)])
        return 0

    driver = SimpleNamespace(
        cuTensorMapEncodeTiled=encode, cuTensorMapReplaceAddress=replace_address, cuLaunchKernelEx=launch
    )
    declared = [f".u{8 * size} p" if size < 128 else ".align 64 .b8 p[128]" for size in sizes]
    given = compiled(tensordesc_meta=[META])
    given.asm["ptx"] = ".entry f(" + ",".join(f".param {one}" for one in declared) + ")"
    with mock.patch.object(direct, "_driver", return_value=driver):
        walking = direct.kernel(given, (5, 1, 1), kinds, {"n": 3}, [([256, 16], [24, 1])], [16, 32, 48])
        run = direct.launcher([(walking, range(3))], 3)
    numbers = [struct.pack("<i", 256), struct.pack("<i", 16), struct.pack("<q", 24), struct.pack("<q", 1)]
    for x, y, z in ((64, 80, 96), (112, 128, 144), (112, 128, 160)):
        run([x, y, z], 0)
        x, y, z = (struct.pack("<Q", address) for address in (x, y, z))
        tensor_map = y + bytes(range(8, 128))
        assert seen.pop() == [x, tensor_map, *numbers, z, struct.pack("<i", 3), bytes(8), bytes(8)]
    assert replaced == [80, 128]  # what has not moved is in the map already


@pytest.mark.gpu
@pytest.mark.parametrize("N", [64, 100, 256, 384])
def test_all_launches_go_straight_and_give_the_same(N, device):
    x = random_inputs(R=N, I=N, J=N, H=4, D=32, dtype=torch.bfloat16, device=device, key_term="additive")
    straight = []

    def noted(*given):
        straight.append(kernel_of(*given))
        return straight[-1]

    def run():
        forward._plans.clear()
        backward._plans.clear()
        for _ in range(2):  # the first compiles, and Triton launches it
            saved = forward.launch(*x.op)
            gradients = backward.launch(x.grad_out, *x.op[:6], *saved, *x.op[6:], True)
        return (*saved, *gradients)

    kernel_of = direct.kernel
    with mock.patch.object(launching.direct, "kernel", return_value=None):
        through_triton = run()
    with mock.patch.object(launching.direct, "kernel", noted):
        past_it = run()
    forward._plans.clear()
    backward._plans.clear()
    assert len(straight) >= 3
    assert None not in straight
    for a, b in zip(past_it, through_triton, strict=True):
        assert torch.equal(a, b)

"""A whole backward with the Hopper kernel for dq, dk and dv, and with the lean ones.

`python docs/benchmarks/hopper_dqkv.py`, on a Hopper GPU, from a checkout; bfloat16, B=1, H=4, D=32. For each N and key
term: milliseconds of both, the largest differences over the largest gradient, and at N=512 the kernels. "tail" leaves
out the last tenth of the keys, "padding" that tenth of the rows wholly as well.
"""

import functools

import torch
import triton

from trifast_inductor.bench import launches
from trifast_inductor.kernels.triangle_attention import backward, forward
from trifast_inductor.kernels.triangle_attention.lean import launch as lean
from trifast_inductor.testing import Inputs, random_inputs

WHERE_IT_IS_TAKEN = lean.dqkv_choice.refusal
REFUSALS = {"dqkv": WHERE_IT_IS_TAKEN, "lean": lambda *_: "not asked for"}


def inputs(N: int, what: str) -> Inputs:
    key_term = "none" if what == "none" else "additive"
    x = random_inputs(R=N, I=N, J=N, H=4, D=32, dtype=torch.bfloat16, device="cuda", key_term=key_term)
    if what != "none":
        x.key_bias.zero_()
        x.key_bias[:, :, N - N // 10 :] = -1e9
    if what == "padding":
        x.key_bias[:, N - N // 10 :] = -1e9
    return x


def main() -> None:
    for N in (256, 384, 512, 1024):
        for what in ("none", "tail", "padding"):
            x = inputs(N, what)
            call = functools.partial(backward.launch, x.grad_out, *x.op[:6], *forward.launch(*x.op), *x.op[6:], True)
            found, times = {}, {}
            for name, refusal in REFUSALS.items():
                lean.dqkv_choice.refusal = refusal
                backward._plans.clear()
                found[name] = call()
                times[name] = triton.testing.do_bench_cudagraph(call, rep=40, return_mode="median")
                if N == 512:
                    for kernel, count, ms in launches.profiled(call):
                        print(f"    {name} {ms:.4f} {count} {kernel[:80]}")
            pairs = zip(found["dqkv"], found["lean"], strict=True)
            off = [((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs]
            print(
                f"N={N} {what}: {times['dqkv']:.4f}, lean {times['lean']:.4f};", *(f"{x:.1e}" for x in off), flush=True
            )


if __name__ == "__main__":
    main()

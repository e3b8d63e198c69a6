"""A model as a package that runs without its Python code: `python docs/recipes/aot_inductor.py [--out node.pt2]`.

torch.export, then AOTInductor with the rewrite, then the package loaded again and run at other sizes. The node is
transformers' ESMFold triangle attention (pip install transformers), its number of residues left open.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from transformers.models.esm.modeling_esmfold import EsmFoldTriangleAttention

import trifast_inductor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where the package is kept; nowhere by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        package_and_run(options.out or Path(folder) / "node.pt2")


@torch.no_grad()
def package_and_run(path: Path) -> None:
    node = EsmFoldTriangleAttention(128, 32, 4).eval()
    torch.nn.init.normal_(node.mha.linear_o.weight, std=0.05)  # starts at 0, where a wrong attention would not show
    x, mask = torch.randn(1, 24, 24, 128), torch.ones(1, 24, 24)
    N = torch.export.Dim("N", min=2, max=1024)
    program = torch.export.export(node, (x, mask), dynamic_shapes=({1: N, 2: N}, {1: N, 2: N}))

    counters.clear()
    with trifast_inductor.register(strict=True):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    print(f"{path.name}: {counters['trifast']['rewritten']} attention rewritten, {path.stat().st_size / 2**20:.1f} MiB")

    run = torch._inductor.aoti_load_package(str(path))  # elsewhere: after `import trifast_inductor`
    for n in (17, 40):
        x, mask = torch.randn(1, n, n, 128), torch.ones(1, n, n)
        mask[..., -3:] = 0  # padding
        torch.testing.assert_close(run(x, mask), node(x, mask), rtol=1e-4, atol=1e-5)
        print(f"N={n}: as eager")


if __name__ == "__main__":
    main()

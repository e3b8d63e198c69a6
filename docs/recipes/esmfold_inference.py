"""ESMFold on a sequence: `python docs/recipes/esmfold_inference.py [--sequence MQIF...] [--blocks 2]`.

The code is transformers', the weights are random: no download, and no meaning in the structure. For the published
weights replace the model by `EsmForProteinFolding.from_pretrained("facebook/esmfold_v1")`; the rest stays.
"""

import argparse

import torch
from transformers import EsmConfig, EsmForProteinFolding
from transformers.models.esm.modeling_esmfold import EsmFoldTriangleAttention

import trifast_inductor

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
TOKENS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>"]


def random_model(blocks: int) -> EsmForProteinFolding:
    """ESMFold with a tiny language model in front of a trunk of the published width."""
    trunk = {"num_blocks": blocks, "sequence_state_dim": 128, "max_recycles": 1}
    torch.manual_seed(0)
    model = EsmForProteinFolding(
        EsmConfig(
            vocab_size=len(TOKENS),
            vocab_list=TOKENS,
            is_folding_model=True,
            esmfold_config={"trunk": trunk, "fp16_esm": False},
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            pad_token_id=1,
            mask_token_id=32,
        )
    )
    for module in model.modules():
        if isinstance(module, EsmFoldTriangleAttention):  # starts at 0, where a wrong attention would not show
            torch.nn.init.normal_(module.mha.linear_o.weight, std=0.05)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequence", default=UBIQUITIN)
    parser.add_argument("--blocks", type=int, default=2)
    options = parser.parse_args()
    model = random_model(options.blocks).to("cuda" if torch.cuda.is_available() else "cpu")
    model.trunk.set_chunk_size(None)  # chunks save eager's memory; the fused op has no use for them

    # What a block of the trunk hands over, without the positions: under random weights these amplify any rounding.
    seen: list[torch.Tensor] = []
    last = model.trunk.blocks[-1]
    last.register_forward_hook(lambda module, args, out: seen.append(out[1].clone()))
    with torch.no_grad():
        model.infer(options.sequence)
        eager = seen[-1]
        for block in model.trunk.blocks:
            block.compile(backend="trifast", dynamic=True)  # one graph for all blocks and all lengths
        output = model.infer(options.sequence)
    difference = ((seen[-1] - eager).norm() / eager.norm()).item()
    print(f"{len(options.sequence)} residues, positions {list(output.positions.shape)}")
    print(f"pair representation: relative difference from eager {difference:.1e}")
    assert difference < 1e-4

    block = model.trunk.blocks[0]
    n, c = len(options.sequence), model.config.esmfold_config.trunk
    s = torch.randn(1, n, c.sequence_state_dim, device=model.device)
    z = torch.randn(1, n, n, c.pairwise_state_dim, device=model.device)
    with torch.no_grad():
        print(trifast_inductor.explain(block.forward, s, z, mask=torch.ones(1, n, device=model.device)))


if __name__ == "__main__":
    main()

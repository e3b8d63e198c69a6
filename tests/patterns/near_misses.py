"""Modules that are nearly triangle attention, each with the reason for which it must be left alone."""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from trifast_inductor.patterns.site import Reason

from .spellings import C, D, H, Projections


class NearMiss(Projections):
    """The plain spelling; each near miss overrides one step."""

    trains = True

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * D**-0.5

    def biased(self, a: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        a = a + self.bias(x).permute(0, 3, 1, 2)[:, None]
        return a + (1e9 * (mask - 1))[:, :, None, None, :]

    def probabilities(self, a: Tensor) -> Tensor:
        return a.softmax(-1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor | tuple[Tensor, ...]:
        q, k, v = (t.transpose(2, 3) for t in self.heads(x))
        p = self.probabilities(self.biased(self.logits(q, k), x, mask))
        return self.gated((p @ v).transpose(2, 3).flatten(-2), x)


class SoftmaxOverQueries(NearMiss):
    def probabilities(self, a: Tensor) -> Tensor:
        return a.softmax(-2)


class SoftmaxOverRows(NearMiss):
    def probabilities(self, a: Tensor) -> Tensor:
        return a.softmax(1)


class Softclamp(NearMiss):
    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.tanh(q @ k.mT * D**-0.5 / 5) * 5


class Squared(NearMiss):
    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT).square()


class RenormalisedProbabilities(NearMiss):
    def probabilities(self, a: Tensor) -> Tensor:
        p = a.softmax(-1)
        return p / (p.sum(-1, keepdim=True) + 1e-6)


class ThresholdedProbabilities(NearMiss):
    def probabilities(self, a: Tensor) -> Tensor:
        return torch.relu(a.softmax(-1) - 0.01)


class DropoutOn(NearMiss):
    def probabilities(self, a: Tensor) -> Tensor:
        return nn.functional.dropout(a.softmax(-1), p=0.1, training=True)


class BiasOfItsOwnForEveryRow(NearMiss):
    """A learned pair bias next to a float mask that varies over rows, queries and keys."""

    def biased(self, a: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        window = torch.cos(x.mean(-1)[:, :, :, None] + x.mean(-1)[:, :, None, :]).detach()
        return a + self.bias(x).permute(0, 3, 1, 2)[:, None] + window[:, :, None]


class LearnedKeyTerm(NearMiss):
    """A bias over (row, key) that is learned: the bias of an ending node whose transpose was forgotten."""

    def biased(self, a: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return a + self.bias(x).permute(0, 1, 3, 2)[:, :, :, None, :]


class LearnedQueryTerm(NearMiss):
    def biased(self, a: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        a = a + self.bias(x).permute(0, 1, 3, 2)[:, :, :, :, None]
        return super().biased(a, x, mask)


class MaskedQueriesBeforeTheBias(NearMiss):
    """A masked query then weighs its keys by the bias alone, which the op cannot do."""

    def biased(self, a: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return super().biased(a.masked_fill(mask[:, :, None, :, None] == 0, -1e9), x, mask)


class AddedQueryMask(NearMiss):
    """Constant along the keys, so without meaning but for its rounding, which is eager's own."""

    def biased(self, a: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return super().biased(a, x, mask) + (1e9 * (mask - 1))[:, :, None, :, None]


class AttentionByNameAlone(NearMiss):
    """SDPA with a key mask only: inductor's own kernels take it."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.transpose(2, 3) for t in self.heads(x))
        kept = (mask > 0).index_fill(-1, torch.zeros(1, dtype=torch.long, device=x.device), True)[:, :, None, None, :]
        o = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=kept)
        return self.gated(o.transpose(2, 3).flatten(-2), x)


class CausalByName(NearMiss):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.transpose(2, 3) for t in self.heads(x))
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.gated(o.transpose(2, 3).flatten(-2), x)


class WindowMask(NearMiss):
    def biased(self, a: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        n = torch.arange(x.shape[1], device=x.device)
        far = (n[:, None] - n[None, :]).abs() > 4
        return (a + self.bias(x).permute(0, 3, 1, 2)[:, None]).masked_fill(far, -1e9)


class TwoSelects(NearMiss):
    def biased(self, a: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        masked = (mask == 0)[:, :, None, None, :]
        return super().biased(a.masked_fill(masked, -1e9), x, mask).masked_fill(masked, -1e4)


class SelectAndAddend(NearMiss):
    def biased(self, a: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return super().biased(a, x, mask).masked_fill((mask == 0)[:, :, None, None, :], -1e9)


class FillFromAnotherTensor(NearMiss):
    def biased(self, a: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return torch.where((mask == 0)[:, :, None, None, :], x.min() - 1e9, a)


class LogitsReturned(NearMiss):
    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.transpose(2, 3) for t in self.heads(x))
        a = self.biased(self.logits(q, k), x, mask)
        return self.gated((a.softmax(-1) @ v).transpose(2, 3).flatten(-2), x), a


class EarlyAliasOfLogitsReturned(NearMiss):
    """A view taken before the in-place adds sees them."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.transpose(2, 3) for t in self.heads(x))
        a = self.logits(q, k)
        alias = a.flatten(0, 1)
        a += self.bias(x).permute(0, 3, 1, 2)[:, None]
        return self.gated((a.softmax(-1) @ v).transpose(2, 3).flatten(-2), x), alias


class ProbabilitiesReturned(NearMiss):
    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.transpose(2, 3) for t in self.heads(x))
        p = self.biased(self.logits(q, k), x, mask).softmax(-1)
        return self.gated((p @ v).transpose(2, 3).flatten(-2), x), p


class ProbabilitiesUsedTwice(NearMiss):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.transpose(2, 3) for t in self.heads(x))
        p = self.biased(self.logits(q, k), x, mask).softmax(-1)
        return self.gated((p @ v + p @ q).transpose(2, 3).flatten(-2), x)


class QueryOverwritten(NearMiss):
    """q is doubled in place after the logits were made of it, which autograd allows in inference only."""

    trains = False

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.transpose(2, 3).contiguous() for t in self.heads(x))
        a = self.biased(self.logits(q, k), x, mask)
        q.mul_(2)
        return self.gated((a.softmax(-1) @ v + q).transpose(2, 3).flatten(-2), x)


class BiasOverwrittenThroughAView(NearMiss):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.transpose(2, 3) for t in self.heads(x))
        bias = self.bias(x)
        a = self.logits(q, k) + bias.permute(0, 3, 1, 2)[:, None]
        bias.view(-1).zero_()
        return self.gated((a.softmax(-1) @ v).transpose(2, 3).flatten(-2), x) + bias.sum()


class FlexAttention(NearMiss):
    """flex_attention with the bias in its score_mod: a fused kernel of its own."""

    trains = False

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.transpose(2, 3).flatten(0, 1) for t in self.heads(x))
        bias, rows = self.bias(x).permute(0, 3, 1, 2).contiguous(), x.shape[1]

        def with_bias(score, b, h, i, j):
            return score + bias[b // rows, h, i, j]

        o = flex_attention(q, k, v, score_mod=with_bias)
        return self.gated(o.transpose(1, 2).flatten(-2).view(*x.shape[:3], -1), x)


class LargeHead(NearMiss):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(C, H * 136, bias=False) for _ in range(3))
        self.wide = nn.Linear(H * 136, H * D)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:-1], H, 136).transpose(2, 3) for p in (self.q, self.k, self.v))
        p = self.biased(self.logits(q, k), x, mask).softmax(-1)
        return self.gated(self.wide((p @ v).transpose(2, 3).flatten(-2)), x)


class NoBiasNoMask(NearMiss):
    def biased(self, a: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return a


class SoftmaxOfAProjection(NearMiss):
    """Weights straight from a Linear, no queries and keys."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        v = self.heads(x)[2].transpose(2, 3)
        weights = self.bias(x).permute(0, 3, 1, 2).softmax(-1)
        return self.gated((weights[:, None] @ v).transpose(2, 3).flatten(-2), x)


class LinearAttention(NearMiss):
    """The softmax runs over the features of q and over the keys of k, before any product."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.transpose(2, 3) for t in self.heads(x))
        o = q.softmax(-1) @ (k.softmax(-2).mT @ v)
        return self.gated(o.transpose(2, 3).flatten(-2), x)


class ProbabilitiesNotContracted(NearMiss):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, _ = (t.transpose(2, 3) for t in self.heads(x))
        p = self.biased(self.logits(q, k), x, mask).softmax(-1)
        return self.gated(p.amax(-1).transpose(2, 3).repeat_interleave(D, -1), x)


class CutByAGraphBreak(NearMiss):
    def probabilities(self, a: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return a.softmax(-1)


class TiedOverRows(NearMiss):
    """Logits summed over the rows, one set of probabilities for all of them: rows are no batch axis here."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        a = torch.einsum("brihd,brjhd->bhij", q, k) * D**-0.5 + self.bias(x).permute(0, 3, 1, 2)
        o = torch.einsum("bhij,brjhd->brihd", a.softmax(-1), v)
        return self.gated(o.flatten(-2), x)


NEAR_MISSES: list[tuple[type[NearMiss], Reason]] = [
    (SoftmaxOverQueries, Reason.NOT_CONTRACTED),
    (SoftmaxOverRows, Reason.SOFTMAX_AXIS),
    (Softclamp, Reason.UNKNOWN_OP),
    (Squared, Reason.UNKNOWN_OP),
    (RenormalisedProbabilities, Reason.PROBABILITIES_USED),
    (ThresholdedProbabilities, Reason.UNKNOWN_OP_AFTER),
    (DropoutOn, Reason.DROPOUT),
    (BiasOfItsOwnForEveryRow, Reason.FULL_TERM),
    (LearnedKeyTerm, Reason.TERM_NEEDS_GRADIENT),
    (LearnedQueryTerm, Reason.QUERY_TERM),
    (MaskedQueriesBeforeTheBias, Reason.QUERY_TERM),
    (AddedQueryMask, Reason.QUERY_TERM),
    (AttentionByNameAlone, Reason.PLAIN_ATTENTION),
    (CausalByName, Reason.PAIR_SELECT),
    (WindowMask, Reason.PAIR_SELECT),
    (TwoSelects, Reason.SEVERAL_KEY_TERMS),
    (SelectAndAddend, Reason.SEVERAL_KEY_TERMS),
    (FillFromAnotherTensor, Reason.FILL_NOT_CONSTANT),
    (LogitsReturned, Reason.LOGITS_USED),
    (EarlyAliasOfLogitsReturned, Reason.LOGITS_USED),
    (ProbabilitiesReturned, Reason.PROBABILITIES_USED),
    (ProbabilitiesUsedTwice, Reason.PROBABILITIES_USED),
    (QueryOverwritten, Reason.INPUT_OVERWRITTEN),
    (BiasOverwrittenThroughAView, Reason.INPUT_OVERWRITTEN),
    (FlexAttention, Reason.ALREADY_FUSED),
    (LargeHead, Reason.HEAD_SIZE),
    (NoBiasNoMask, Reason.PLAIN_ATTENTION),
    (SoftmaxOfAProjection, Reason.NO_PRODUCT),
    (LinearAttention, Reason.NO_PRODUCT),
    (ProbabilitiesNotContracted, Reason.NOT_CONTRACTED),
    (CutByAGraphBreak, Reason.GRAPH_BREAK),
    (TiedOverRows, Reason.TIED),
]

"""What makes an attention something else: one step of a `Composed` module changed.

None of these may ever give a wrong number; most must be declined.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .variations import Composed


class Mutated(Composed):
    """`trains` is False where eager itself has no gradient."""

    trains = True

    def axis(self, letter: str) -> int:
        return next(position for position, group in enumerate(self.recipe.layout) if letter in group)


class TiedRows(Mutated):
    """The logits are averaged over the rows."""

    def changed(self, t: Tensor, place: str) -> Tensor:
        # A copy: eager itself fails on a mask that is filled in place into an expanded tensor.
        return t.mean(self.axis("r"), keepdim=True).expand_as(t).clone() if place == "logits" else t


class LogitsRead(Mutated):
    """The logits have a second reader."""

    def changed(self, t: Tensor, place: str) -> Tensor:
        if place == "softmax input":
            self.seen = t.clamp(-5, 5).mean()
        return t

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask) + self.seen


class ProbabilitiesRead(Mutated):
    """The probabilities have a second reader."""

    def changed(self, t: Tensor, place: str) -> Tensor:
        if place == "probabilities":
            self.seen = t.square().mean()
        return t

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask) + self.seen


class LogitsReturned(Mutated):
    """An alias of the logits leaves the graph."""

    def changed(self, t: Tensor, place: str) -> Tensor:
        if place == "logits":
            self.seen = t.flatten()
        return t

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x, mask), self.seen


class QueryAxis(Mutated):
    """The softmax runs over the queries."""

    def changed(self, t: Tensor, place: str) -> Tensor:
        if place != "softmax input":
            return t
        return t.softmax(self.axis("i")).log()


class Softclamp(Mutated):
    """Logits bounded by a tanh."""

    def changed(self, t: Tensor, place: str) -> Tensor:
        return 3 * torch.tanh(t / 3) if place == "logits" else t


class TemperatureOverKeys(Mutated):
    """Logits multiplied by something that varies over the keys."""

    def changed(self, t: Tensor, place: str) -> Tensor:
        if place != "logits":
            return t
        shape = [1] * t.dim()
        shape[self.axis("j")] = t.shape[self.axis("j")]
        return t * torch.linspace(0.5, 2, shape[self.axis("j")], dtype=t.dtype).view(shape)


class TemperatureOverQueries(Mutated):
    """The same over the queries, which may be rewritten: the queries can take it."""

    def changed(self, t: Tensor, place: str) -> Tensor:
        if place != "logits":
            return t
        shape = [1] * t.dim()
        shape[self.axis("i")] = t.shape[self.axis("i")]
        return t * torch.linspace(0.5, 2, shape[self.axis("i")], dtype=t.dtype).view(shape)


class BiasForEveryRow(Mutated):
    """A learned addend as large as the logits, beside the pair bias."""

    def changed(self, t: Tensor, place: str) -> Tensor:
        if place != "logits":
            return t
        return t + torch.cos(torch.arange(t.numel(), dtype=t.dtype)).view(t.shape) * self.bias.weight.sum()


class LearnedMask(Mutated):
    """A key term that needs a gradient."""

    def with_terms(self, a: Tensor, bias: Tensor, mask: Tensor, keys: str, sizes: dict[str, int]) -> Tensor:
        learned = nn.functional.softplus(self.bias.weight.sum()) * mask.to(a.dtype)
        shape = dict.fromkeys("brhij", 1) | {letter: sizes[letter] for letter in keys}
        if all(len(group) == 1 for group in self.recipe.layout):
            learned = learned.permute([keys.index(group) for group in self.recipe.layout if group in keys])
            a = a + learned.reshape([shape[group] for group in self.recipe.layout])
        else:
            a = torch.sin(a)
        return super().with_terms(a, bias, mask, keys, sizes)


class WindowMask(Mutated):
    """A pair mask that is no outer product."""

    def changed(self, t: Tensor, place: str) -> Tensor:
        if place != "softmax input":
            return t
        i, j = self.axis("i"), self.axis("j")
        n = torch.arange(t.shape[i])
        far = (n[:, None] - n[None, :]).abs() > 2
        shape = [1] * t.dim()
        shape[i] = shape[j] = len(n)
        return t.masked_fill((far if i < j else far.mT).reshape(shape), -1e9)


class DropoutOn(Mutated):
    """Dropout in training."""

    def changed(self, t: Tensor, place: str) -> Tensor:
        return nn.functional.dropout(t, 0.3, training=True) if place == "probabilities" else t


class Renormalised(Mutated):
    """Probabilities changed before they are contracted."""

    def changed(self, t: Tensor, place: str) -> Tensor:
        return torch.relu(t - 0.01) if place == "probabilities" else t


class _Overwritten(Mutated):
    """Something is written in place while eager still needs what it held, or no longer does."""

    trains = False
    target = ""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, *letters: str) -> Tensor:
        self.written = {"q": q, "k": k, "v": v, "bias": bias}[self.target]
        return super().attend(q, k, v, bias, mask, *letters)

    def changed(self, t: Tensor, place: str) -> Tensor:
        if place == "softmax input":
            self.written.view(-1).mul_(1.5)
        return t

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask) + self.written.mean()


class QueryOverwritten(_Overwritten):
    target = "q"


class KeyOverwritten(_Overwritten):
    target = "k"


class ValueOverwritten(_Overwritten):
    """Before the values are read: allowed, and what they hold then counts."""

    target = "v"


class BiasOverwritten(_Overwritten):
    target = "bias"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return Composed.forward(self, x, mask)

    def changed(self, t: Tensor, place: str) -> Tensor:
        if place == "softmax input":
            self.written.zero_()
        return t


class ContractedTwice(Mutated):
    """The product of queries and keys also sums over the heads."""

    def changed(self, t: Tensor, place: str) -> Tensor:
        if place == "logits" and "h" in self.recipe.layout:
            return t.sum(self.axis("h"), keepdim=True).expand_as(t)
        return torch.sin(t) if place == "logits" else t


class KeysTurned(Mutated):
    """The values meet the probabilities in another order of the keys."""

    def changed(self, t: Tensor, place: str) -> Tensor:
        return t.flip(self.axis("j")) if place == "probabilities" else t


class QueriesAndKeysSwapped(Mutated):
    """The probabilities are transposed before they meet the values; the sizes still fit."""

    def changed(self, t: Tensor, place: str) -> Tensor:
        return t.transpose(self.axis("i"), self.axis("j")).contiguous() if place == "probabilities" else t


class RowsAndQueriesSwapped(Mutated):
    """Rows and queries change places before the softmax, and not back."""

    def changed(self, t: Tensor, place: str) -> Tensor:
        if place == "logits" and {"r", "i"} <= set(self.recipe.layout):
            return t.transpose(self.axis("r"), self.axis("i"))
        return t


MUTATIONS: list[type[Mutated]] = [
    TiedRows,
    LogitsRead,
    ProbabilitiesRead,
    LogitsReturned,
    QueryAxis,
    Softclamp,
    TemperatureOverKeys,
    TemperatureOverQueries,
    BiasForEveryRow,
    LearnedMask,
    WindowMask,
    DropoutOn,
    Renormalised,
    QueryOverwritten,
    KeyOverwritten,
    ValueOverwritten,
    BiasOverwritten,
    ContractedTwice,
    KeysTurned,
    QueriesAndKeysSwapped,
    RowsAndQueriesSwapped,
]

"""Triangle attention put together from choices: each axis on which public models differ, and what they do on it.

`Recipe` names one choice for each axis; `Composed` is the module it describes. The same choices serve the table in
`docs/patterns.md`, the test of each choice by itself, and the random combinations of the fuzz test.

Letters: b batch, r row, i query, j key, h head, d head size. A layout is a tuple of groups; the letters of a group
are folded into one axis, so `("br", "h", "i", "j")` are logits whose rows lie in the batch.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Callable
from random import Random

import einops
import torch
from torch import Tensor, nn

from .spellings import Projections

Layout = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to write one step, and a model in which it is seen."""

    name: str
    seen_in: str
    run: Callable[..., Tensor]


def table(*choices: tuple[str, str, Callable[..., Tensor]]) -> dict[str, Choice]:
    return {name: Choice(name, seen_in, run) for name, seen_in, run in choices}


# Layout


def pack(t: Tensor, letters: str, layout: Layout, by: str = "torch") -> Tensor:
    """A tensor whose axes are `letters`, in a layout of the same letters."""
    if by == "einops":
        axes = " ".join(f"({' '.join(group)})" if len(group) > 1 else group for group in layout)
        return einops.rearrange(t, f"{' '.join(letters)} -> {axes}")
    t = t.permute([letters.index(letter) for letter in "".join(layout)])
    if all(len(group) == 1 for group in layout):
        return t
    sizes = dict(zip("".join(layout), t.shape, strict=True))
    return t.reshape([product_of(sizes, group) for group in layout])


def product_of(sizes: dict[str, int], group: str) -> int:
    size = 1
    for letter in group:
        size = size * sizes[letter]
    return size


def unpack(t: Tensor, layout: Layout, sizes: dict[str, int], letters: str) -> Tensor:
    t = t.reshape([sizes[letter] for group in layout for letter in group])
    return t.permute(["".join(layout).index(letter) for letter in letters])


def fit(t: Tensor, letters: str, layout: Layout, sizes: dict[str, int], repeated: str = "") -> Tensor:
    """Arranged to be broadcast to a layout; letters in `repeated`, or folded with one it has, are expanded."""
    wanted = "".join(layout)
    present = [letter for letter in wanted if letter in letters]
    t = t.permute([letters.index(letter) for letter in present])
    for position, letter in enumerate(wanted):
        if letter not in letters:
            t = t.unsqueeze(position)
    expanded = []
    for group in layout:
        is_partly_there = bool(set(group) & set(letters + repeated))
        expanded += [sizes[letter] if is_partly_there else 1 for letter in group]
    t = t.expand(expanded)
    if all(len(group) == 1 for group in layout):
        return t
    by_letter = dict(zip(wanted, expanded, strict=True))
    return t.reshape([product_of(by_letter, group) for group in layout])


def names_of(*layouts: Layout) -> dict[str, str]:
    groups = dict.fromkeys(group for layout in layouts for group in layout)
    return dict(zip(groups, string.ascii_letters, strict=False))


# Contractions: q [*batch, i, d] and k [*batch, j, d] give logits; p and v give the result


def einsum(left: Tensor, right: Tensor, ll: Layout, rl: Layout, ol: Layout) -> Tensor:
    name = names_of(ll, rl, ol)
    l, r, o = ("".join(name[group] for group in layout) for layout in (ll, rl, ol))
    return torch.einsum(f"{l},{r}->{o}", left, right)


def einsum_ellipsis(left: Tensor, right: Tensor, ll: Layout, rl: Layout, ol: Layout) -> Tensor:
    name = names_of(ll, rl, ol)
    l, r, o = ("".join(name[group] for group in layout[-2:]) for layout in (ll, rl, ol))
    return torch.einsum(f"...{l},...{r}->...{o}", left, right)


def einops_einsum(left: Tensor, right: Tensor, ll: Layout, rl: Layout, ol: Layout) -> Tensor:
    name = names_of(ll, rl, ol)
    l, r, o = (" ".join(name[group] for group in layout) for layout in (ll, rl, ol))
    return einops.einsum(left, right, f"{l}, {r} -> {o}")


def _as_matrices(right: Tensor, ll: Layout, rl: Layout) -> Tensor:
    """The right operand with its contracted axis second to last."""
    return right if rl[-2] == ll[-1] else right.transpose(-1, -2)


def matmul(left: Tensor, right: Tensor, ll: Layout, rl: Layout, ol: Layout) -> Tensor:
    return torch.matmul(left, _as_matrices(right, ll, rl))


def at_sign(left: Tensor, right: Tensor, ll: Layout, rl: Layout, ol: Layout) -> Tensor:
    return left @ (right if rl[-2] == ll[-1] else right.mT)


def bmm(left: Tensor, right: Tensor, ll: Layout, rl: Layout, ol: Layout) -> Tensor:
    flat = torch.bmm(left.flatten(0, -3), _as_matrices(right, ll, rl).flatten(0, -3))
    return flat.view(*left.shape[:-1], flat.shape[-1])


def baddbmm(left: Tensor, right: Tensor, ll: Layout, rl: Layout, ol: Layout) -> Tensor:
    left_, right_ = left.flatten(0, -3), _as_matrices(right, ll, rl).flatten(0, -3)
    zero = torch.zeros(1, 1, 1, dtype=left.dtype, device=left.device)
    flat = torch.baddbmm(zero, left_, right_, beta=0.0, alpha=1.0)
    return flat.view(*left.shape[:-1], flat.shape[-1])


def broadcast_sum(left: Tensor, right: Tensor, ll: Layout, rl: Layout, ol: Layout) -> Tensor:
    right = _as_matrices(right, ll, rl)
    return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)


CONTRACTIONS = table(
    ("einsum", "RoseTTAFold2, any letters and orders", einsum),
    ("einsum with ellipsis", "other public models", einsum_ellipsis),
    ("einops.einsum", "lucidrains", einops_einsum),
    ("matmul", "OpenFold, boltz, protenix, ESMFold", matmul),
    ("@", "other public models", at_sign),
    ("bmm", "other public models", bmm),
    ("baddbmm", "other public models", baddbmm),
    ("multiply and sum", "other public models", broadcast_sum),
)
ANY_ORDER = ("einsum", "einops.einsum")

# Scale: `place` says where a choice may stand


def _rsqrt(t: Tensor, d: int) -> Tensor:
    return t * torch.rsqrt(torch.tensor(float(d), dtype=t.dtype))


def _zero_dim(t: Tensor, d: int) -> Tensor:
    return t / torch.sqrt(torch.tensor(d, dtype=t.dtype))


SCALES = table(
    ("none", "q scaled by its projection", lambda t, d: t),
    ("t * d**-0.5", "lucidrains", lambda t, d: t * d**-0.5),
    ("t / sqrt(d)", "boltz", lambda t, d: t / math.sqrt(d)),
    ("t /= sqrt(d)", "OpenFold", lambda t, d: t.div_(math.sqrt(d))),
    ("t.mul(d**-0.5)", "other public models", lambda t, d: t.mul(d**-0.5)),
    ("rsqrt of a tensor", "other public models", _rsqrt),
    ("0-d tensor", "other public models", _zero_dim),
)

# Masks: (logits, mask bool True = kept fitted to the logits, fill or -inf value)


def _additive(a: Tensor, kept: Tensor, big: float) -> Tensor:
    return a + big * (kept.to(a.dtype) - 1)


def _additive_in_place(a: Tensor, kept: Tensor, big: float) -> Tensor:
    a += big * (kept.to(a.dtype) - 1)
    return a


def _where_tensor(a: Tensor, kept: Tensor, big: float) -> Tensor:
    return torch.where(kept, a, torch.full_like(a, -big))


MASKS = table(
    ("none", "other public models", lambda a, kept, big: a),
    ("a + inf * (mask - 1)", "OpenFold", _additive),
    ("a += inf * (mask - 1)", "other public models", _additive_in_place),
    ("a - inf * (1 - mask)", "other public models", lambda a, kept, big: a - big * (1 - kept.to(a.dtype))),
    ("masked_fill", "lucidrains", lambda a, kept, big: a.masked_fill(~kept, -big)),
    ("masked_fill_", "alphafold2-pytorch", lambda a, kept, big: a.masked_fill_(~kept, -big)),
    ("where(mask, a, number)", "alphafold3-pytorch", lambda a, kept, big: torch.where(kept, a, -big)),
    ("where(~mask, number, a)", "other public models", lambda a, kept, big: torch.where(~kept, -big, a)),
    ("where(mask, a, full)", "other public models", _where_tensor),
    ("masked_fill(-inf)", "other public models", lambda a, kept, big: a.masked_fill(~kept, -math.inf)),
    ("finfo.min", "boltz", lambda a, kept, big: a.masked_fill(~kept, torch.finfo(a.dtype).min)),
    ("-finfo.max", "lucidrains", lambda a, kept, big: a.masked_fill(~kept, -torch.finfo(a.dtype).max)),
)
IN_PLACE_MASKS = ("a += inf * (mask - 1)", "masked_fill_")

# Softmax and what follows it


def _upcast(a: Tensor, dim: int) -> Tensor:
    return torch.softmax(a.float(), dim).to(a.dtype)


def _upcast_by_dtype(a: Tensor, dim: int) -> Tensor:
    return a.softmax(dim, dtype=torch.float32).to(a.dtype)


def _autocast_off(a: Tensor, dim: int) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        return nn.functional.softmax(a, dim)


SOFTMAXES = table(
    ("F.softmax", "OpenFold", lambda a, dim: nn.functional.softmax(a, dim)),
    ("torch.softmax", "RoseTTAFold2", lambda a, dim: torch.softmax(a, dim)),
    ("a.softmax", "lucidrains", lambda a, dim: a.softmax(dim)),
    ("nn.Softmax", "other public models", lambda a, dim: nn.Softmax(dim=dim)(a)),
    ("float32 and back", "boltz", _upcast),
    ("dtype=float32", "alphafold3-pytorch", _upcast_by_dtype),
    ("autocast off around it", "OpenFold softmax_no_cast", _autocast_off),
    ("nan_to_num after it", "other public models", lambda a, dim: a.softmax(dim).nan_to_num(0.0)),
    ("dropout with p=0", "other public models", lambda a, dim: nn.functional.dropout(a.softmax(dim), 0.0)),
    ("dropout in eval", "lucidrains", lambda a, dim: nn.functional.dropout(a.softmax(dim), 0.2, training=False)),
    ("contiguous", "other public models", lambda a, dim: a.softmax(dim).contiguous()),
    ("clone", "other public models", lambda a, dim: a.softmax(dim).clone()),
)
LOSSY_SOFTMAXES = ("float32 and back", "dtype=float32")

# Bias: (bias with axes "bijh", layout of the logits, sizes)

BIASES = table(
    ("broadcast", "OpenFold", lambda t, layout, sizes: fit(t, "bijh", layout, sizes)),
    ("expanded over rows", "OpenFold chunked", lambda t, layout, sizes: fit(t, "bijh", layout, sizes, "r")),
    ("repeated over rows", "lucidrains", lambda t, layout, sizes: fit(t, "bijh", layout, sizes, "r").clone()),
    ("contiguous", "boltz", lambda t, layout, sizes: fit(t.permute(0, 3, 1, 2).contiguous(), "bhij", layout, sizes)),
    ("none", "MSA column attention", lambda t, layout, sizes: torch.zeros((), dtype=t.dtype)),
)

NODES = ("starting", "ending by transpose", "ending by letters")
ORDERS = ("bias, then mask", "mask, then bias", "summed first")
SCALE_PLACES = ("q", "k", "logits", "after the adds")
# Batch axes of the logits, then where queries and keys go; einsum may put them anywhere.
LAYOUTS: tuple[Layout, ...] = (
    ("b", "r", "h", "i", "j"),
    ("b", "h", "r", "i", "j"),
    ("h", "b", "r", "i", "j"),
    ("br", "h", "i", "j"),
    ("brh", "i", "j"),
    ("b", "rh", "i", "j"),
    ("b", "r", "i", "j", "h"),
    ("b", "i", "r", "h", "j"),
    ("b", "h", "i", "r", "j"),
    ("b", "r", "j", "i", "h"),
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One choice on every axis; the defaults are the plain spelling."""

    node: str = "starting"
    layout: Layout = LAYOUTS[0]
    contraction: str = "matmul"
    values: str = "matmul"
    scale: str = "t * d**-0.5"
    scale_place: str = "q"
    bias: str = "broadcast"
    mask: str = "a + inf * (mask - 1)"
    outer_mask: bool = False
    inf: float = 1e9
    order: str = "bias, then mask"
    softmax: str = "F.softmax"
    moved_by: str = "torch"
    shuffle: int = 0  # einsum's operands and result in the order of this seed; 0 leaves them

    @property
    def is_possible(self) -> bool:
        """Some choices exclude each other: matmul wants its axes last, a select cannot be summed first."""
        last = self.layout[-2:] == ("i", "j")
        if not last and {self.contraction, self.values} - set(ANY_ORDER):
            return False
        is_select = "fill" in self.mask or "where" in self.mask or "finfo" in self.mask
        if self.order == "summed first" and (is_select or self.mask in IN_PLACE_MASKS or self.bias == "none"):
            return False
        if self.outer_mask and self.softmax in LOSSY_SOFTMAXES and "finfo" in self.mask:
            return False  # -inf once it is cast down, and NaN for masked queries
        if self.outer_mask and (not is_select or "-inf" in self.mask or self.order == "mask, then bias"):
            return False
        return self.bias != "none" or self.mask != "none"

    def __str__(self) -> str:
        default = Recipe()
        changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return ", ".join(f"{k}={v}" for k, v in changed.items() if v != getattr(default, k)) or "plain"


class Composed(Projections):
    """The module of a recipe. Called with x `[B, N, N, C]` and mask bool `[B, N, N]`, True where kept."""

    mask_dtype = torch.bool

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.layouts = self._layouts()

    def _layouts(self) -> tuple[Layout, Layout, Layout, Layout]:
        """Of q, k, v and the result."""
        recipe = self.recipe
        batch = tuple(group for group in recipe.layout if group not in ("i", "j"))
        layouts = [(*batch, *last) for last in ("id", "jd", "jd", "id")]
        random = Random(recipe.shuffle)
        for position, layout in enumerate(layouts):
            contraction = recipe.contraction if position < 2 else recipe.values
            if recipe.shuffle and contraction in ANY_ORDER:
                layouts[position] = tuple(random.sample(layout, len(layout)))
        q, k, v, o = layouts
        return q, k, v, o

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        recipe = self.recipe
        pair, is_ending = x, recipe.node == "ending by transpose"
        if is_ending:
            x, mask = x.transpose(1, 2), mask.transpose(1, 2)
        rows, columns = ("bir", "bjr") if recipe.node == "ending by letters" else ("bri", "brj")
        bias = self.bias(x) if recipe.node != "ending by letters" else self.bias(x).transpose(1, 2)
        o = self.attend(*self.heads(x), bias, mask, rows, columns)
        out = self.gated(o.flatten(-2), x)
        out = out.transpose(1, 2) if is_ending else out
        return pair + out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, queries: str, keys: str) -> Tensor:
        recipe, layout = self.recipe, self.recipe.layout
        sizes = dict(zip(queries + "hd", q.shape, strict=True))
        sizes["j"] = sizes["i"]
        ql, kl, vl, ol = self.layouts
        q = pack(q, queries + "hd", ql, recipe.moved_by)
        k = pack(k, keys + "hd", kl, recipe.moved_by)
        q = self.scaled(q.clone() if "/=" in recipe.scale else q, "q")
        k = self.scaled(k.clone() if "/=" in recipe.scale else k, "k")
        a = CONTRACTIONS[recipe.contraction].run(q, k, ql, kl, layout)
        a = self.changed(self.scaled(a, "logits"), "logits")
        a = self.scaled(self.with_terms(a, bias, mask, keys, sizes), "after the adds")
        a = self.changed(a, "softmax input")
        p = SOFTMAXES[recipe.softmax].run(a, layout.index("j"))
        p = self.changed(p, "probabilities")
        v = pack(v, keys + "hd", vl, recipe.moved_by)
        o = CONTRACTIONS[recipe.values].run(p, v, layout, vl, ol)
        return unpack(o, ol, sizes, queries + "hd")

    def scaled(self, t: Tensor, place: str) -> Tensor:
        recipe = self.recipe
        return SCALES[recipe.scale].run(t, self.q.out_features // 2) if place == recipe.scale_place else t

    def changed(self, t: Tensor, place: str) -> Tensor:
        """Where a mutation may step in."""
        return t

    def with_terms(self, a: Tensor, bias: Tensor, mask: Tensor, keys: str, sizes: dict[str, int]) -> Tensor:
        recipe = self.recipe
        bias = BIASES[recipe.bias].run(bias, recipe.layout, sizes)
        kept = fit(mask, keys, recipe.layout, sizes)
        if recipe.outer_mask:
            kept = kept & fit(mask, keys.replace("j", "i"), recipe.layout, sizes)
        add_mask = MASKS[recipe.mask].run
        if recipe.order == "summed first":
            return a + (add_mask(torch.zeros_like(kept, dtype=a.dtype), kept, recipe.inf) + bias)
        if recipe.order == "mask, then bias":
            return add_mask(a, kept, recipe.inf) + bias
        return add_mask(a + bias, kept, recipe.inf)


EACH: dict[str, tuple[object, ...]] = {
    "node": NODES,
    "layout": LAYOUTS,
    "contraction": tuple(CONTRACTIONS),
    "values": tuple(CONTRACTIONS),
    "scale": tuple(SCALES),
    "scale_place": SCALE_PLACES,
    "bias": tuple(BIASES),
    "mask": tuple(MASKS),
    "outer_mask": (False, True),
    "inf": (1e4, 1e6, 1e9, 1e10),
    "order": ORDERS,
    "softmax": tuple(SOFTMAXES),
    "moved_by": ("torch", "einops"),
    "shuffle": (0, 1, 2),
}


def each_choice() -> list[Recipe]:
    """The plain spelling with every choice put in once, other axes following where they must."""
    recipes = []
    for axis, choices in EACH.items():
        for choice in choices:
            recipe = dataclasses.replace(Recipe(), **{axis: choice})
            if (axis == "layout" and not recipe.is_possible) or axis == "shuffle":
                recipe = dataclasses.replace(recipe, contraction="einsum", values="einsum")
            if axis == "outer_mask" and choice:
                recipe = dataclasses.replace(recipe, mask="masked_fill")
            if recipe not in recipes and recipe.is_possible:
                recipes.append(recipe)
    return recipes

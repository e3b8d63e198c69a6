"""What was found at a softmax: a `Site` that can be replaced, or a `Refusal` with the reason."""

from __future__ import annotations

import dataclasses
import enum

import torch
from torch import fx

from trifast_inductor.patterns.axes import Atom, Label, Labels, flat
from trifast_inductor.patterns.recording import Value


class Reason(enum.Enum):
    """Why a softmax is left alone: a slug for counters, a sentence, and the way out."""

    NO_PRODUCT = ("no-product", "the softmax does not read a product of queries and keys", "nothing to do")
    GRAPH_BREAK = (
        "graph-break",
        "the softmax reads an input of its graph, so a graph break may have cut the attention apart",
        "TORCH_LOGS=graph_breaks shows where; for transformers' ESMFold call trifast_inductor.shims.esmfold() first",
    )
    NOT_CONTRACTED = (
        "not-contracted",
        "the probabilities are not contracted with values over the softmax axis",
        "nothing to do unless this is meant to be attention",
    )
    SOFTMAX_AXIS = (
        "softmax-axis",
        "the softmax runs over an axis that is not the key axis of the product",
        "nothing to do unless this is meant to be attention",
    )
    TIED = (
        "tied",
        "the product sums over a second axis besides the head's, as attention tied over rows does",
        "nothing to do",
    )
    PLAIN_ATTENTION = (
        "plain-attention",
        "there is neither a pair bias nor a key mask, so inductor's own attention serves it",
        "nothing to do",
    )
    ALREADY_FUSED = (
        "already-fused",
        "flex_attention is a fused kernel of its own",
        "nothing to do; written as eager attention, it would be rewritten",
    )
    UNKNOWN_OP = (
        "unknown-op",
        "something other than scale, bias, mask, cast or layout happens between product and softmax",
        "move it out of the attention, or keep eager attention here",
    )
    UNKNOWN_OP_AFTER = (
        "unknown-op-after",
        "something other than cast or layout happens between softmax and the product with the values",
        "move it out of the attention, or keep eager attention here",
    )
    DROPOUT = ("dropout", "dropout is on", "call model.eval() or set p=0")
    LOGITS_USED = (
        "logits-used",
        "the logits are also used elsewhere, so they have to exist",
        "do not return, store or reuse the attention logits",
    )
    PROBABILITIES_USED = (
        "probabilities-used",
        "the probabilities are also used elsewhere, so they have to exist",
        "do not return, store or reuse the attention weights",
    )
    FULL_TERM = (
        "full-term",
        "an addend varies over rows, queries and keys together, so it is as large as the logits",
        "add the mask and the pair bias separately",
    )
    TERM_NEEDS_GRADIENT = (
        "term-needs-gradient",
        "an addend that varies over rows and keys needs a gradient, and is no pair bias",
        "detach it, or make it vary over queries and keys only",
    )
    QUERY_TERM = (
        "query-term",
        "an addend, or a mask that is not the last thing applied, depends on the row and the query",
        "mask the keys; masked queries can be zeroed after the attention",
    )
    PAIR_SELECT = (
        "pair-select",
        "a boolean mask depends on query and key together, and is no product of a mask for each",
        "fill with -inf, or add a float mask to the pair bias instead",
    )
    SEVERAL_KEY_TERMS = (
        "several-key-terms",
        "masks are applied in several ways at once",
        "combine the masks into one before the attention",
    )
    FILL_NOT_CONSTANT = (
        "fill-not-constant",
        "masked logits are replaced by a value that is not a known constant",
        "use a Python number as the fill value",
    )
    INPUT_OVERWRITTEN = (
        "input-overwritten",
        "an input of the attention is written in place before the attention ends",
        "write out of place, or after the attention",
    )
    HEAD_SIZE = (
        "head-size",
        "the head size is not between 1 and 128, or differs between queries and values",
        "choose a head size that the kernels take",
    )
    DTYPE = ("dtype", "the dtype is not float32, bfloat16, float16 or float64", "cast the model")
    DEVICE = ("device", "no kernel exists for this device", "run on CUDA or on the CPU")
    NO_TRITON = ("no-triton", "Triton cannot be imported", "install triton")
    UNDECIDED_SIZES = (
        "undecided-sizes",
        "symbolic sizes cannot be proved to fit together",
        "mark the sizes static or equal, or compile with dynamic=False",
    )
    VMAP = (
        "vmap",
        "the attention runs under torch.func.vmap, where tensors hide one of their axes",
        "give the samples an axis of their own, which the op takes as one more batch axis",
    )
    UNREADABLE = (
        "unreadable",
        "the graph could not be re-read as ATen",
        "report the model; it runs as plain inductor",
    )

    def __init__(self, slug: str, sentence: str, way_out: str) -> None:
        self.slug = slug
        self.sentence = sentence
        self.way_out = way_out

    @property
    def looks_like_attention(self) -> bool:
        """Whether a softmax refused for this reason counts as declined; the others are no attention of ours."""
        return self not in _NOT_OURS

    def message(self, detail: str = "") -> str:
        """What a user reads."""
        return f"{self.sentence}{f' ({detail})' if detail else ''}: {self.way_out}"


# A softmax refused for one of these is not counted, and no error under `strict`.
_NOT_OURS = frozenset(
    {
        Reason.NO_PRODUCT,
        Reason.NOT_CONTRACTED,
        Reason.SOFTMAX_AXIS,
        Reason.TIED,
        Reason.PLAIN_ATTENTION,
        Reason.ALREADY_FUSED,
    }
)


class Declined(Exception):
    """Raised while a site is being read; becomes a `Refusal`."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason.sentence)
        self.reason = reason
        self.detail = detail


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A softmax that is left alone."""

    softmax: Value
    reason: Reason
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor of the user's graph with its axes labelled, to be cast to `casts` one after the other."""

    value: Value
    labels: Labels
    casts: tuple[torch.dtype, ...] = ()
    read_at: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.casts[-1] if self.casts else self.value.dtype

    @property
    def atoms(self) -> frozenset[Atom]:
        return frozenset(flat(*self.labels))


@dataclasses.dataclass(frozen=True)
class Factor:
    """A product of a number and of tensors that do not vary over the keys; `(tensor, True)` divides."""

    number: float = 1.0
    tensors: tuple[tuple[Operand, bool], ...] = ()

    @property
    def atoms(self) -> frozenset[Atom]:
        return frozenset(atom for tensor, _ in self.tensors for atom in tensor.atoms)

    def times(self, other: Factor) -> Factor:
        return Factor(self.number * other.number, self.tensors + other.tensors)


@dataclasses.dataclass(frozen=True)
class Term:
    """An addend of the logits: `factor · operand`. `depth` counts steps from the softmax up."""

    operand: Operand
    factor: Factor
    depth: int

    @property
    def atoms(self) -> frozenset[Atom]:
        return self.operand.atoms | self.factor.atoms

    @property
    def requires_grad(self) -> bool:
        tensors = (self.operand, *(tensor for tensor, _ in self.factor.tensors))
        return any(tensor.value.requires_grad for tensor in tensors)


@dataclasses.dataclass(frozen=True)
class Select:
    """A fill where `mask` is True (or False, when `keeps`)."""

    mask: Operand
    keeps: bool
    fill: float
    depth: int


@dataclasses.dataclass(frozen=True)
class MaskPart:
    """A boolean mask that fills where it is `fills_where`."""

    operand: Operand
    fills_where: bool

    @property
    def atoms(self) -> frozenset[Atom]:
        return self.operand.atoms


@dataclasses.dataclass(frozen=True)
class Masks:
    """Where logits are replaced by `fill`. Keys: a part of the op. Pairs: only with -inf, carried by the bias.

    Queries: only with a finite fill, applied last; such a query weighs all keys alike.
    """

    fill: float = 0.0
    keys: tuple[MaskPart, ...] = ()
    pairs: tuple[MaskPart, ...] = ()
    queries: tuple[MaskPart, ...] = ()

    @property
    def all(self) -> tuple[MaskPart, ...]:
        return (*self.keys, *self.pairs, *self.queries)


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which atoms play which part.

    b: bias and mask vary; r: rows, which share the bias; h: only the bias varies; c: contracted in q·k; d: of v.
    """

    b: Label
    r: Label
    h: Label
    i: Label
    j: Label
    c: Label
    d: Label


@dataclasses.dataclass(frozen=True)
class Site:
    """One triangle attention: out = softmax(scale·q·k + biases ⊕ key terms ⊕ masks) · v.

    `undone_writes` are in-place scalings of queries or keys, to be made out of place: the op scales.
    `masked_rows_are_zero`: a softmax of nothing but -inf gives 0 as SDPA's does, and not NaN.
    """

    softmax: Value
    q: Operand
    k: Operand
    v: Operand
    out: Operand
    biases: tuple[Term, ...]
    key_terms: tuple[Term, ...]
    masks: Masks
    scale: Factor
    key_term_first: bool
    masked_rows_are_zero: bool
    roles: Roles
    dtype: torch.dtype
    ends_at: int
    undone_writes: tuple[fx.Node, ...] = ()

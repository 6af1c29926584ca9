"""The graph that passes read: canonical operations laid over the graph of a front end, and the sites found in it.

A front end adds its operations in execution order, keeps its own node in `Operation.origin`, and calls what it does not
understand `opaque`. A pass reads operations and writes sites; it changes no operation, so the original graph stays the
only truth and a front end can apply to it by name what was decided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch

from sparsecomp.window import Maps, Window

if TYPE_CHECKING:
    from sparsecomp.blocks import FfnSite, MoeBlock

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "relu6", "hardswish")
"""What a site can apply to its product, as the op and the kernels spell it."""

Size = int | str
"""One dimension: an int, or the text of a symbolic expression ("s0", "2*s1")."""


class IRError(ValueError):
    """A graph or a site breaks a rule of the IR; the message says which rule, where, and what was expected."""


@dataclass(eq=False)
class Operation:
    """One operation of the overlay; it produces one value that carries its name.

    Attributes:
        name: Unique in the graph; the name of the node in the graph of the front end.
        kind: Canonical kind: input, constant, linear, addmm, matmul, conv, batch_norm (in evaluation mode), pad (with
            zeros), transpose, add, mul, relu, relu6, hardswish, gelu, gelu_tanh, silu, sigmoid, tanh, identity,
            reshape, layer_norm, softmax, attention, embedding, composite (an operation of PyTorch with linears inside),
            transform (part of torch.func), output, or opaque.
        inputs: Names of the values read, the canonical operands first and in canonical order (linear, conv: x, weight,
            bias; addmm: bias, x, weight; batch_norm: x, mean, variance, weight, bias; matmul, add, mul: left, right),
            then any other.
        attrs: What else defines the operation. constant: `value` (tensor), `index` (graph input or -1), `path`
            (qualified name or ""). input: `index`, `why` (why it is not constant). transpose: `permutation`. add, mul
            with one input: `scalar`. conv: `function`, `stride`, `padding`, `dilation`, `groups`. pad: `amounts` as
            `F.pad` takes them. batch_norm: `eps`, `affine` (whether it has a weight, a bias). composite: `expanded`,
            `weights` (names of the inputs that hold them), `function`. Any: `composite`, the operation that it was
            expanded from.
        shape: Sizes; of a dynamic dimension the hint that the front end saw.
        sizes: The same with dynamic dimensions as text, so that equality means equal for every run.
        dynamic: Whether any dimension is dynamic.
        dtype: Element type, None for what is not a tensor.
        origin: The node of the front end.
        module: Qualified path of the module that called the operation, "" when none did.
        module_type: Class name of that module, "" when there is none.
        contiguous: Whether the value is laid out row by row.
        mutates: Names of the inputs whose contents the operation changes.
        aliases: Whether the value may share memory with an input.
    """

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    attrs: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    dynamic: bool = False
    dtype: torch.dtype | None = None
    origin: Any = None
    module: str = ""
    module_type: str = ""
    sizes: tuple[Size, ...] | None = None
    contiguous: bool = True
    mutates: tuple[str, ...] = ()
    aliases: bool = False

    def __post_init__(self) -> None:
        if self.sizes is None:
            self.sizes = self.shape

    def __str__(self) -> str:
        dims = ", ".join(str(size) for size in self.sizes or ())
        dtype = "" if self.dtype is None else f" {str(self.dtype).removeprefix('torch.')}[{dims}]"
        changes = f" changes {', '.join(self.mutates)}" if self.mutates else ""
        module = f"  # {self.module}" if self.module else ""
        return f"{self.name} = {self.kind}({', '.join(self.inputs)}){dtype}{changes}{module}"


@dataclass(eq=False)
class LinearSite:
    """A place where a constant weight meets an activation; its value is `activation(x @ W.T + bias) + residual`.

    Attributes:
        name: Qualified module name ("encoder.layer.0.attention.self.query"), the name of the weight when no module owns
            it, or the kind of the operation; a second call gets the suffix "#2".
        weight: The real constant, [O, I], or [I, O] when `transposed`. Of a site declined because its weight is not
            constant, a tensor on the meta device that only has the shape.
        weight_op: The constant (or, when declined, the value) that holds the weight.
        weight_index: Index of the graph input that holds the weight; -1 when the graph itself holds it.
        transposed: Whether `weight` is stored [I, O].
        x: Value multiplied, [..., I] with at least two dimensions.
        bias: Value added to the product, [O], or None.
        residual: Value added last, with exactly the shape of the output, or None.
        activation: One of `ACTIVATIONS`.
        operations: Absorbed operations in graph order; the last is the anchor, whose value the site replaces.
        tokens: Product of the leading dimensions of x (a hint where they are dynamic).
        dynamic: Whether the number of tokens may change from call to call.
        dtype: Element type of x, weight and output.
        declined: Why the site stays dense, None when it may be rewritten.
        composite: The composite operation that the site is inside of or was expanded from, "" for none.
    """

    name: str
    weight: torch.Tensor
    weight_op: str
    weight_index: int
    transposed: bool
    x: str
    operations: tuple[str, ...]
    tokens: int
    dynamic: bool
    dtype: torch.dtype
    bias: str | None = None
    residual: str | None = None
    activation: str = "none"
    declined: str | None = None
    composite: str = ""

    @property
    def anchor(self) -> str:
        """The operation whose value the site replaces."""
        return self.operations[-1]

    @property
    def out_features(self) -> int:
        """O, the number of rows of W; 0 for a declined weight that is not a matrix."""
        return _matrix(self.weight)[1 if self.transposed else 0]

    @property
    def in_features(self) -> int:
        """I, the number of columns of W; 0 for a declined weight that is not a matrix."""
        return _matrix(self.weight)[0 if self.transposed else 1]

    def __str__(self) -> str:
        parts = [f"x={self.x}", f"weight={self.weight_op}{'.T' if self.transposed else ''}"]
        parts += [f"{key}={value}" for key, value in (("bias", self.bias), ("residual", self.residual)) if value]
        parts += [f"activation={self.activation}"] if self.activation != "none" else []
        state = f"declined: {self.declined}" if self.declined else f"replaces {', '.join(self.operations)}"
        size = f"{self.in_features} -> {self.out_features}, {self.tokens} tokens"
        return f"{self.name}: {size} ({', '.join(parts)}) {state}"


@dataclass(frozen=True)
class Norm:
    """A batch normalisation in evaluation mode: the values it reads, each `[O]`, and its epsilon."""

    mean: str
    variance: str
    weight: str | None
    bias: str | None
    eps: float

    @property
    def values(self) -> tuple[str, ...]:
        """The names of what it reads."""
        return tuple(name for name in (self.mean, self.variance, self.weight, self.bias) if name is not None)


@dataclass(eq=False)
class ConvSite:
    """A convolution with a constant weight; its value is `activation(norm(conv(x) + bias)) + residual`.

    Attributes:
        weight: The real constant, [O, I / groups, kh, kw] or [O, I / groups, k].
        window: Of the convolution; None for a declined site that is not understood.
        x: Value convolved, [N, I, H, W] or [N, I, L].
        maps: N, H and W of x (hints where they are dynamic); H is 1 for [N, I, L].
        tokens: Output positions of all images, N * OH * OW.
        norm: Batch normalisation behind the convolution, or None.
        residual_first: Whether the residual is added before the activation.
        held: Where all values that `term_names` names are constant: of each the index of the graph input that holds it
            (-1 when the graph itself does) and the tensor. None where they are to be computed with at each call.

    The others are those of `LinearSite`.
    """

    name: str
    weight: torch.Tensor
    weight_op: str
    weight_index: int
    window: Window | None
    x: str
    maps: Maps
    operations: tuple[str, ...]
    tokens: int
    dynamic: bool
    dtype: torch.dtype
    bias: str | None = None
    norm: Norm | None = None
    residual: str | None = None
    residual_first: bool = False
    activation: str = "none"
    declined: str | None = None
    composite: str = ""
    held: tuple[tuple[int, torch.Tensor], ...] | None = None

    transposed = False

    @property
    def term_names(self) -> tuple[str, ...]:
        """The names of what its sums are scaled with and what is added to them."""
        bias = () if self.bias is None else (self.bias,)
        return bias + (() if self.norm is None else self.norm.values)

    @property
    def anchor(self) -> str:
        """The operation whose value the site replaces."""
        return self.operations[-1]

    @property
    def out_features(self) -> int:
        """O, the number of output channels."""
        return int(self.weight.shape[0]) if self.weight.ndim else 0

    @property
    def in_features(self) -> int:
        """I / groups * kh * kw, what a row of the weight has."""
        return prod(self.weight.shape[1:])

    def __str__(self) -> str:
        norm = [f"norm={self.norm.mean}"] if self.norm is not None else []
        parts = [f"x={self.x}", f"weight={self.weight_op}", f"window={self.window}", *norm]
        parts += [f"{key}={value}" for key, value in (("bias", self.bias), ("residual", self.residual)) if value]
        parts += [f"activation={self.activation}"] if self.activation != "none" else []
        state = f"declined: {self.declined}" if self.declined else f"replaces {', '.join(self.operations)}"
        size = f"{self.in_features} -> {self.out_features}, {self.tokens} positions"
        return f"{self.name}: {size} ({', '.join(parts)}) {state}"


Site = LinearSite | ConvSite


def _matrix(weight: torch.Tensor) -> tuple[int, int]:
    return (int(weight.shape[0]), int(weight.shape[1])) if weight.ndim == 2 else (0, 0)


class SparseGraph:
    """Operations in execution order, the edges between them, and the sites that passes found.

    Attributes:
        sites: Every candidate in graph order, the declined ones included.
        ffns: The feed-forward blocks among them, in graph order.
        moes: The mixtures of experts.
    """

    def __init__(self) -> None:
        self._graph: nx.DiGraph[str] = nx.DiGraph()
        self._positions: dict[str, int] = {}
        self._writers: list[Operation] = []
        self.sites: list[Site] = []
        self.ffns: list[FfnSite] = []
        self.moes: list[MoeBlock] = []

    def add(self, operation: Operation) -> Operation:
        """Append an operation.

        Raises:
            IRError: Its name is taken, or it reads a value that no earlier operation produces.
        """
        if operation.name in self._positions:
            raise IRError(f"two operations are called {operation.name!r}; names must be unique in a graph")
        for name in (*operation.inputs, *operation.mutates):
            if name not in self._positions:
                raise IRError(f"{operation.name} reads {name!r}, which no earlier operation produces")
        self._graph.add_node(operation.name, operation=operation)
        self._positions[operation.name] = len(self._positions)
        for name in operation.inputs:
            self._graph.add_edge(name, operation.name)
        if operation.mutates:
            self._writers.append(operation)
        return operation

    def operation(self, name: str) -> Operation:
        """The operation that produces a value.

        Raises:
            IRError: There is none of that name.
        """
        if name not in self._positions:
            raise IRError(f"the graph has no operation {name!r}")
        found: Operation = self._graph.nodes[name]["operation"]
        return found

    def users(self, name: str) -> list[Operation]:
        """The operations that read a value, in execution order; one that reads it twice is listed once."""
        self.operation(name)
        return [self.operation(user) for user in sorted(self._graph.successors(name), key=self._positions.__getitem__)]

    def position(self, name: str) -> int:
        """Place in execution order, from 0."""
        self.operation(name)
        return self._positions[name]

    def writers(self, after: str | None = None, before: str | None = None) -> list[Operation]:
        """The operations that change one of their inputs; with bounds those strictly between two operations."""
        start = -1 if after is None else self.position(after)
        stop = len(self) if before is None else self.position(before)
        return [operation for operation in self._writers if start < self._positions[operation.name] < stop]

    def roots(self, name: str) -> frozenset[str]:
        """The values whose memory `name` may share, itself included: what a change to one may show in the other."""
        seen: set[str] = set()
        stack = [name]
        while stack:
            current = stack.pop()
            if current not in seen:
                seen.add(current)
                operation = self.operation(current)
                stack.extend(operation.inputs if operation.aliases else ())
        return frozenset(seen)

    def __iter__(self) -> Iterator[Operation]:
        return (self.operation(name) for name in self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    def __contains__(self, name: object) -> bool:
        return name in self._positions

    def __str__(self) -> str:
        lines = [str(operation) for operation in self]
        lines += [f"site {site}" for site in self.sites]
        return "\n".join(lines + [f"ffn {ffn}" for ffn in self.ffns] + [f"moe {moe}" for moe in self.moes])

    def verify(self) -> None:
        """Check the rules that every pass may rely on.

        Raises:
            IRError: An edge runs backwards, there is more than one output, or a site is not well formed.
        """
        for before, after in self._graph.edges:
            if self._positions[before] >= self._positions[after]:
                raise IRError(f"{after} reads {before!r} before it is produced")
        outputs = [operation.name for operation in self if operation.kind == "output"]
        if len(outputs) > 1:
            raise IRError(f"a graph has one output, this one has {len(outputs)}: {', '.join(outputs)}")
        owners: dict[str, str] = {}
        names: set[str] = set()
        for site in self.sites:
            if site.name in names:
                raise IRError(f"two sites are called {site.name!r}; give the second the suffix #2")
            names.add(site.name)
            if site.declined is None:
                self._verify_site(site)
                for name in site.operations:
                    if owners.setdefault(name, site.name) != site.name:
                        raise IRError(f"{name} is absorbed by two sites, {owners[name]} and {site.name}")
        for ffn in self.ffns:
            ffn.verify(self)

    def _verify_site(self, site: Site) -> None:
        def require(holds: bool, rule: str) -> None:
            if not holds:
                raise IRError(f"site {site.name}: {rule}")

        require(bool(site.operations), "it absorbs no operation")
        require(site.activation in ACTIVATIONS, f"activation {site.activation!r} is none of {', '.join(ACTIVATIONS)}")
        places = [self.position(name) for name in site.operations]
        require(places == sorted(set(places)), f"operations {site.operations} are not in graph order")
        weight, x, out = self.operation(site.weight_op), self.operation(site.x), self.operation(site.anchor)
        require(weight.kind == "constant", f"weight {site.weight_op} is of kind {weight.kind}, expected constant")
        if isinstance(site, LinearSite):
            product = (*(x.sizes or ())[:-1], site.out_features)
            tokens = prod(x.shape[:-1])
            require(site.weight.ndim == 2, f"weight has shape {tuple(site.weight.shape)}, expected a matrix")
            require(x.shape[-1:] == (site.in_features,), f"x has shape {x.shape}, expected [..., {site.in_features}]")
            require(len(x.shape) >= 2, f"x has shape {x.shape}, expected at least two dimensions")
            require(out.sizes == product, f"{out.name} has shape {out.sizes}, expected {product}")
        else:
            tokens = out.shape[0] * prod(out.shape[2:])
            require(site.window is not None, "it has no window")
            require(site.weight.ndim == len(x.shape) and len(x.shape) in (3, 4), f"x has shape {x.shape}")
            require(out.shape[1:2] == (site.out_features,), f"{out.name} has shape {out.shape}")
            for name in site.norm.values if site.norm is not None else ():
                sizes = self.operation(name).sizes
                require(sizes == (site.out_features,), f"{name} has shape {sizes}, expected ({site.out_features},)")
        require(site.dynamic or tokens == site.tokens, f"tokens is {site.tokens} but x has shape {x.shape}")
        if site.bias is not None:
            sizes = self.operation(site.bias).sizes
            require(sizes == (site.out_features,), f"bias has shape {sizes}, expected ({site.out_features},)")
        if site.residual is not None:
            sizes = self.operation(site.residual).sizes
            require(sizes == out.sizes, f"residual has shape {sizes}, expected {out.sizes}")
        norm = site.norm.values if isinstance(site, ConvSite) and site.norm is not None else ()
        for operand in (site.x, site.bias, site.residual, *norm):
            if operand is not None:
                require(operand not in site.operations, f"{operand} is an operand and absorbed at once")
                require(self.position(operand) < places[-1], f"{operand} is produced after the anchor {site.anchor}")
        for name, following in zip(site.operations, site.operations[1:], strict=False):
            users = [user.name for user in self.users(name)]
            require(users == [following], f"{name} is absorbed but used by {', '.join(users)}")

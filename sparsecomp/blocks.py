"""What is found above single sites: feed-forward blocks and mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecomp.ir import IRError, LinearSite, SparseGraph

UNNAMED = "ffn"
"""What a block is called whose linears no module holds but the model itself."""


@dataclass(eq=False)
class FfnSite:
    """A feed-forward block around its linears: `down(activation(gate(x)) [* up(x)])`.

    The linears stay sites of their own; whoever rewrites the block as a whole does not rewrite them.

    Attributes:
        name: What the qualified names of the linears have in common: the module of the block.
        gate: The linear below the activation; of a fused block it holds the rows of up as well.
        up: The linear that is multiplied with the activation, None when there is none or it is fused with gate.
        down: The linear behind.
        fused: "" or, for a weight of gate that holds both, which of its halves comes first: "gate" or "up".
        activation: One of `ACTIVATIONS`, or `relu2` (the square of a ReLU).
        floor: Hidden values up to this one are set to zero (FATReLU); 0 is what a ReLU does.
        operations: All that the block absorbs, in graph order; the last is the anchor of `down`.
        declined: Why the block cannot be rewritten as a whole, None when it can.
    """

    name: str
    gate: LinearSite
    up: LinearSite | None
    down: LinearSite
    activation: str
    operations: tuple[str, ...]
    fused: str = ""
    floor: float = 0.0
    declined: str | None = None

    @property
    def anchor(self) -> str:
        """The operation whose value the block replaces."""
        return self.operations[-1]

    @property
    def x(self) -> str:
        """The value that gate and up multiply."""
        return self.gate.x

    @property
    def residual(self) -> str | None:
        """What is added to the block's output."""
        return self.down.residual

    @property
    def linears(self) -> tuple[LinearSite, ...]:
        """Its linears: gate, up where it is one of its own, down."""
        return (self.gate, self.down) if self.up is None else (self.gate, self.up, self.down)

    @property
    def gated(self) -> bool:
        """Whether the activation is multiplied with a second projection."""
        return self.up is not None or bool(self.fused)

    @property
    def hidden(self) -> int:
        """Hidden units."""
        return self.down.in_features

    @property
    def exact_zeros(self) -> bool:
        """Whether the hidden units hold zeros that the activation makes."""
        return self.activation in ("relu", "relu2", "relu6")

    def __str__(self) -> str:
        form = f"{self.activation}-gated" if self.gated else self.activation
        state = f"declined: {self.declined}" if self.declined else f"replaces {', '.join(self.operations)}"
        size = f"{self.gate.in_features} -> {self.hidden} -> {self.down.out_features}"
        return f"{self.name}: {size}, {form}{', fused' if self.fused else ''}; {state}"

    def verify(self, graph: SparseGraph) -> None:
        """Check that nothing outside of the block reads what is not computed any more when it is rewritten.

        Raises:
            IRError: The block is not well formed.
        """
        if self.declined is not None:
            return
        inside = set(self.operations)
        places = [graph.position(name) for name in self.operations]
        if places != sorted(set(places)) or self.anchor != self.down.anchor:
            raise IRError(f"ffn {self.name}: operations {self.operations} are not in graph order up to its down linear")
        for name in self.operations[:-1]:
            outside = [user.name for user in graph.users(name) if user.name not in inside]
            if outside:
                raise IRError(f"ffn {self.name}: {name} is absorbed but used by {', '.join(outside)}")
        for linear in self.linears:
            if linear.declined is not None or linear not in graph.sites or not set(linear.operations) <= inside:
                raise IRError(f"ffn {self.name}: {linear.name} is not a site that may be rewritten inside of it")
            if linear is not self.down and (linear.x != self.x or linear.residual is not None):
                raise IRError(f"ffn {self.name}: {linear.name} does not read {self.x} alone")


@dataclass(frozen=True)
class MoeBlock:
    """A mixture of experts: a router that picks a few of them for each token.

    Attributes:
        name: Qualified name of the module of the block.
        router: Name of the router's linear.
        experts: How many there are.
        picked: How many a token uses, 0 when it is not known.
        sites: Names of the linear sites inside, those of shared experts too; none where experts are one product.
        stacked: Names of weights that hold all experts, `[experts, O, I]`: they stay dense, see `split_experts_`.
    """

    name: str
    router: str
    experts: int
    picked: int
    sites: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()

    def __str__(self) -> str:
        picked = f"{self.picked} of " if self.picked else ""
        text = f"{self.name}: {picked}{self.experts} experts, router {self.router}, {len(self.sites)} linears inside"
        if not self.stacked:
            return text
        # Such a product gathers the weights of the picked experts, or sorts the tokens by expert.
        return (
            f"{text}; {', '.join(self.stacked)} stay dense: each holds all experts in one weight, and which of them is "
            "multiplied with which tokens is known only at run time; sparsecomp.split_experts_(model) makes them sites"
        )

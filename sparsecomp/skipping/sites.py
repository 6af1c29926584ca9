"""The FFN blocks of a model of modules, and the linears that share an input.

The names are those under which the common libraries keep the parts. A block is named by the module that holds all of
its parts: the `mlp` of a LLaMA layer, the whole layer of OPT or of `torch.nn.TransformerEncoderLayer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparsecomp.pruning.calibration import Call, find_blocks
from sparsecomp.pruning.sites import FilterFn, choose_sites
from sparsecomp.pruning.statistics import stages

_LAYOUTS = (
    ("gate_proj", "up_proj", "down_proj"),  # LLaMA, Mistral, Qwen, Gemma
    ("gate_up_proj", "gate_up_proj", "down_proj"),  # Phi-3
    ("wi_0", "wi_1", "wo"),  # T5 1.1
    ("w1", "w3", "w2"),  # experts
    ("wi", "", "wo"),  # T5
    ("fc1", "", "fc2"),  # OPT, ViT
    ("intermediate.dense", "", "output.dense"),  # BERT
    ("c_fc", "", "c_proj"),  # GPT-2
    ("linear1", "", "linear2"),  # torch.nn
    ("lin1", "", "lin2"),  # DistilBERT
    ("dense_h_to_4h", "", "dense_4h_to_h"),  # GPT-NeoX
    ("up_proj", "", "down_proj"),  # Nemotron, experts without a gate
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "intermediate.intermediate_act_fn")


@dataclass(frozen=True, eq=False)
class FFN:
    """An FFN block.

    Attributes:
        name: qualified name of the module that holds all of its parts.
        first: what reads the block's input: the gate, or up where there is no gate.
        gated: whether the activated gate is multiplied with an up projection.
        activation: the module between, None where the activation is a function.
        down: gives the block's output.
        linears: qualified names of what holds its weights: of the gate, of up where it is one of its own, of down.
    """

    name: str
    first: nn.Module
    gated: bool
    activation: nn.Module | None
    down: nn.Module
    linears: tuple[str, ...]

    def down_matrix(self) -> Tensor:
        """The down weight as `[out, hidden]`."""
        weight = self.down.get_parameter("weight").detach()
        # The Conv1D of GPT-2 is a linear whose weight is [in, out].
        return weight if isinstance(self.down, nn.Linear) else weight.T


def find_ffns(model: nn.Module, filter_fn: FilterFn | None = None) -> list[FFN]:
    """The FFN blocks of a model, in the order of its modules.

    Args:
        model: any module.
        filter_fn: `(module, qualified_name) -> bool`, asked for the module that holds a block; all if None.
    """
    found = []
    for name, module in model.named_modules():
        ffn = _ffn(name, module)
        if ffn is not None and (filter_fn is None or filter_fn(module, name)):
            found.append(ffn)
    return found


def _ffn(name: str, module: nn.Module) -> FFN | None:
    for first, up, down in _LAYOUTS:
        parts = [_submodule(module, path) for path in (first, up, down) if path]
        if all(part is not None and getattr(part, "weight", None) is not None for part in parts):
            prefix = f"{name}." if name else ""
            acts = (_submodule(module, path) for path in _ACTIVATIONS)
            activation = next((act for act in acts if act is not None), None)
            if activation is None and (up or first == "up_proj"):
                # Without a module between, what the gate gives is not seen, nor whether up comes before down.
                return None
            assert parts[0] is not None
            assert parts[-1] is not None
            linears = tuple(dict.fromkeys(prefix + path for path in (first, up, down) if path))
            return FFN(name, parts[0], bool(up), activation, parts[-1], linears)
    return None


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        found = getattr(module, part, None)
        if not isinstance(found, nn.Module):
            return None
        module = found
    return module


@dataclass(frozen=True, eq=False)
class InputGroup:
    """Linears that get the same input, and so skip the same entries of it.

    Attributes:
        names: qualified names.
        modules: in the order of the names.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Linear, ...]


def find_input_groups(model: nn.Module, call: Call, filter_fn: FilterFn | None = None) -> list[InputGroup]:
    """The linears of a model by the input that they share, in the order in which they run.

    Args:
        model: any module; it is run once on `call`.
        call: a call of the model.
        filter_fn: `(module, qualified_name) -> bool`; None means the linears of the repeated blocks, which leaves out
            the head that gives the logits.
    """
    if filter_fn is None:
        blocks = tuple(f"{name}." for name, _ in find_blocks(model))

        def filter_fn(module: nn.Module, name: str) -> bool:
            return name.startswith(blocks) if blocks else True

    chosen = filter_fn
    sites = choose_sites(model, lambda module, name: isinstance(module, nn.Linear) and chosen(module, name))
    groups, _ = stages(model, call, sites)
    return [_group([(site.name, site.module) for site in group]) for group in groups]


def _group(members: Sequence[tuple[str, nn.Module]]) -> InputGroup:
    linears = tuple(module for _, module in members if isinstance(module, nn.Linear))
    return InputGroup(tuple(name for name, _ in members), linears)

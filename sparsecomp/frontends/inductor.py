"""How Inductor calls our ops: by a Python function and with an output from its own plan of memory.

An op that Inductor does not know goes through PyTorch's dispatcher, is followed by checks of what it gave, and its
output is fresh memory: of a ResNet-50 with 90 % zeros that is a fifteenth of the time (docs/convolutions.md). Code in
C++ (`cpp_wrapper`) and tensors on other devices keep to the op.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from sparsecomp.log import log

_MODULE = "sparsecomp.runtime.calls"


@functools.cache
def register_lowerings() -> None:
    """Tell Inductor, once; where its internals are other ones than those of the tested versions, the ops stay ops."""
    try:
        _register()
    except (ImportError, AttributeError, TypeError) as error:
        log.warning("ops are called through the dispatcher: this version of Inductor cannot be extended: %s", error)


def _register() -> None:
    from torch._inductor import ir
    from torch._inductor.lowering import fallback_handler, register_lowering
    from torch._inductor.utils import convert_shape_to_inductor
    from torch._inductor.virtualized import V

    class Call(ir.ExternKernelOut):
        """A call of a function of `runtime.calls`; places of operands that are not given hold None."""

        def __init__(self, name: str, op: Any, layout: Any, operands: Sequence[Any], constants: Sequence[Any]) -> None:
            self._given = [operand is not None for operand in operands]
            inputs = [operand for operand in operands if operand is not None]
            super().__init__(layout, inputs, constants, python_kernel_name=f"sparsecomp_calls.{name}", op_overload=op)

        def codegen_args(self) -> list[str]:
            arguments = super().codegen_args()
            inputs, constants = iter(arguments[: len(self.inputs)]), arguments[len(self.inputs) :]
            return [next(inputs) if given else "None" for given in self._given] + constants

        def codegen(self, wrapper: Any) -> None:
            wrapper.add_import_once(f"from {_MODULE.rpartition('.')[0]} import calls as sparsecomp_calls")
            super().codegen(wrapper)

    def extend(name: str, operands: int, constants: int) -> None:
        """The first arguments of an op are tensors or None, of which the first is one; then come those of the call."""
        op = getattr(torch.ops.sparsecomp, name).default
        by_dispatcher = fallback_handler(op)

        def lower(*arguments: Any) -> Any:
            x, value = arguments[0], V.graph.current_node.meta.get("val")
            if V.graph.cpp_wrapper or value is None or x.get_device().type != "cpu":
                return by_dispatcher(*arguments)
            size = convert_shape_to_inductor(value.shape)
            layout = ir.FixedLayout(x.get_device(), value.dtype, size, ir.FlexibleLayout.contiguous_strides(size))
            given = [
                None if value is None else ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(value))
                for value in arguments[:operands]
            ]
            return ir.TensorBox.create(Call(name, op, layout, given, arguments[operands : operands + constants]))

        register_lowering(op, type_promotion_kind=None)(lower)

    extend("linear", 3, 1)
    extend("conv", 3, 1)
    extend("max_pool", 1, 2)

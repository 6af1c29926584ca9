"""Sizes that each call gives, as TVM's variables: what is computed from them, its bounds, and the same in C."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsecomp.exporting.program import Count, Size

_BETWEEN = {"Add": "+", "Sub": "-", "Mul": "*", "Div": "/", "FloorDiv": "/", "FloorMod": "%", "Mod": "%"}
"""Operators of C for TVM's; sizes are not negative, so that rounding down is rounding to zero."""
_COMPARED = {"Max": ">", "Min": "<"}


class Symbols:
    """One variable of TVM for each size, with its bounds.

    Args:
        sizes: of the model.
    """

    def __init__(self, sizes: Sequence[Size]) -> None:
        from tvm import tirx
        from tvm.sym import Analyzer

        self.sizes = tuple(sizes)
        self._analyzer: Any = Analyzer()
        self._variables = [tirx.Var(f"size_{index}", "int64") for index in range(len(self.sizes))]
        for variable, size in zip(self._variables, self.sizes, strict=True):
            bind_range(self._analyzer, variable, size.least, size.most)

    def dimension(self, size: int | Size) -> Any:
        """A dimension as TVM takes it."""
        return size if isinstance(size, int) else self._variables[self.sizes.index(size)]

    @property
    def upper_bounds(self) -> dict[str, int]:
        """The largest sizes by the names of the variables, as TVM's memory planning takes them."""
        return {str(v.name): size.most for v, size in zip(self._variables, self.sizes, strict=True)}

    def count(self, expression: Any) -> Count:
        """What an expression of TVM is.

        Raises:
            ValueError: it depends on values that are not known ahead of time, or has no bound.
        """
        text = self._text(expression)
        bound = self._analyzer.const_int_bound(expression)
        least, most = int(bound.min_value), int(bound.max_value)
        if least < 0 or most >= 2**62:
            raise ValueError(f"the size {expression} has no bounds that could be planned for")
        return Count(text, least, most)

    def _text(self, expression: Any) -> str:
        if isinstance(expression, int):
            return str(expression)
        kind = type(expression).__name__
        if kind == "IntImm":
            return str(int(expression.value))
        if kind in _BETWEEN:
            return f"({self._text(expression.a)} {_BETWEEN[kind]} {self._text(expression.b)})"
        if kind in _COMPARED:
            a, b = self._text(expression.a), self._text(expression.b)
            return f"({a} {_COMPARED[kind]} {b} ? {a} : {b})"
        for index, variable in enumerate(self._variables):
            if variable.same_as(expression):
                return f"sizes[{index}]"
        raise ValueError(f"the size {expression} depends on values of a call")


def bind_range(analyzer: Any, variable: Any, least: int, most: int) -> None:
    """Tell TVM's analyzer between which numbers a variable is, both included."""
    from tvm import ir

    analyzer.bind(variable, ir.Range.from_min_extent(least, most - least + 1))

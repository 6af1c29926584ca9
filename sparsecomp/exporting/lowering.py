"""Whole models through TVM to C functions that need no run time; beside `kernels.tir` what imports TVM.

TVM's importer reads the graph, in which every site is one operation of ours and becomes a call of a C function. What
is left is fused and lowered to TIR, its memory is planned, and the TIR is compiled with plain C signatures: buffers
become bare pointers, and arrays inside of functions become parameters too, so that nothing is allocated.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sparsecomp.exporting.program import Operand, Program, Size, Step, Tensor, product
from sparsecomp.exporting.schedules import scheduled
from sparsecomp.exporting.symbols import Symbols, bind_range

SITE_OP = "SparsecompSite"
"""Operation that stands for a site in the graph that is given; its attribute `index` is its number."""
_SITE = "site_"
_SMALL = 256
"""Bytes of an array that may lie on the stack."""

OutputShape = Callable[[int, tuple[Any, ...]], tuple[Any, ...]]


class UnsupportedError(ValueError):
    """The model has an operation that cannot be exported."""


def lower(
    model: onnx.ModelProto,
    shapes: Mapping[str, Sequence[int | Size]],
    output_shape: OutputShape,
    target: Mapping[str, Any],
    source: str,
) -> Program:
    """Lower a model.

    Args:
        model: its sites are operations `SITE_OP` of float32.
        shapes: of all inputs.
        output_shape: gives the shape of a site's output for its number and the shape of its x, whose dimensions are
            numbers or what TVM computes with.
        target: of TVM.
        source: name of the file, for messages.

    Returns:
        The program; steps of sites have neither a label nor a prediction.

    Raises:
        UnsupportedError: an operation is not known to the importer, or cannot be computed ahead of time.
    """
    import tvm

    sizes = tuple(dict.fromkeys(size for shape in shapes.values() for size in shape if isinstance(size, Size)))
    symbols = Symbols(sizes)
    module = _import(model, shapes, output_shape, source, symbols)
    module, main = _plan(tvm, module, symbols)
    program = Program(_inputs(model, shapes, symbols), [], sizes)
    try:
        _Reader(tvm, program, module, symbols, model.graph.node).read(main)
    except ValueError as error:
        raise UnsupportedError(f"{source} cannot be exported: {error}") from error
    program.outputs = [replace(t, name=v.name) for t, v in zip(program.outputs, model.graph.output, strict=True)]
    _compile(tvm, program, module, target)
    return program


# -- from ONNX to a planned graph -------------------------------------------------------------------------------------


def _import(
    model: onnx.ModelProto,
    shapes: Mapping[str, Sequence[int | Size]],
    output_shape: OutputShape,
    source: str,
    symbols: Symbols,
) -> Any:
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import onnx_frontend

    known = {*onnx_frontend._get_convert_map(), "Constant", "If", SITE_OP}
    for node in model.graph.node:
        if node.op_type not in known:
            raise UnsupportedError(
                f"{source}: node {_named(node)} is of the type {node.op_type}, which cannot be exported: TVM's "
                f"importer has no such operation"
            )

    class Importer(onnx_frontend.ONNXGraphImporter):
        """TVM's importer with our operation."""

        node_at_work: onnx.NodeProto | None = None

        def _check_for_unsupported_ops(self, graph: Any) -> None:
            """Done above, with names."""

        def _parse_value_proto(self, value_proto: Any) -> Any:
            if isinstance(value_proto, onnx.NodeProto):
                self.node_at_work = value_proto
            return super()._parse_value_proto(value_proto)

        def _convert_operator(self, op_name: str, inputs: Any, attrs: Any, opset: int) -> Any:
            if op_name == "Range" and (found := _counted(tvm, list(inputs))) is not None:
                return self.bb.normalize(found)
            if op_name != SITE_OP:
                return super()._convert_operator(op_name, inputs, attrs, opset)
            index = attrs["index"]
            given = [self.bb.normalize(value) for value in list(inputs)]
            shape = tuple(_number(size) for size in given[0].ty.shape)
            out = relax.TensorType(output_shape(index, shape), "float32")
            return self.bb.emit(relax.call_dps_packed(f"{_SITE}{index}", given, out_ty=out))

    dimensions = {name: [symbols.dimension(size) for size in sizes] for name, sizes in shapes.items()}
    importer = Importer(dimensions, "float32", sanitize=False)
    importer.node_at_work = None
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    try:
        # The importer prints what it fails on, and warns about names.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return importer.from_onnx(model.graph, opset)
    except Exception as error:  # whatever the importer raises for what it cannot read, with the node that it was at
        node = importer.node_at_work
        where = "" if node is None else f"node {_named(node)} ({node.op_type}) "
        raise UnsupportedError(f"{source}: {where}cannot be exported: {error}") from error


def _counted(tvm: Any, inputs: Sequence[Any]) -> Any:
    """The numbers 0, 1 and so on up to a size that each run gives; None for other ranges.

    TVM's importer knows no length of such a range, and so of nothing that is computed from it.
    """
    start, limit, step = inputs
    if not (tvm.ir.is_prim_expr(limit) and all(isinstance(value, tvm.ir.GenericConst) for value in (start, step))):
        return None
    if (int(start.value.numpy()), int(step.value.numpy())) != (0, 1) or str(start.ty.dtype) != "int64":
        return None
    return tvm.relax.op.arange(tvm.relax.prim_value(0), limit, tvm.relax.prim_value(1), "int64")


def _named(node: onnx.NodeProto) -> str:
    return repr(node.name or f"that gives {', '.join(node.output)}")


def _number(size: Any) -> Any:
    """A dimension as a number, if it is one."""
    return int(size.value) if hasattr(size, "value") else size


def _plan(tvm: Any, module: Any, symbols: Symbols) -> tuple[Any, Any]:
    step = tvm.relax.transform
    module["main"] = module["main"].with_attr("tir_var_upper_bound", symbols.upper_bounds)
    passes = [
        step.DecomposeOpsForInference(),
        step.LegalizeOps(),
        step.AnnotateTIROpPattern(),
        step.FoldConstant(),
        step.FuseOps(),
        step.FuseTIR(),
        step.DeadCodeElimination(),
        step.RewriteDataflowReshape(),
        step.ToNonDataflow(),
        step.RemovePurityChecking(),
        step.CallTIRRewrite(),
        step.StaticPlanBlockMemory(),
        step.AttachGlobalSymbol(),
    ]
    for each in passes:
        module = each(module)
    return module, module["main"]


def _inputs(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int | Size]], symbols: Symbols) -> list[Tensor]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        Tensor(
            value.name,
            tuple(symbols.count(symbols.dimension(size)) for size in shapes[value.name]),
            np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
        )
        for value in model.graph.input
        if value.name not in constants
    ]


class _Reader:
    """Reads the bindings of the planned `main` into steps."""

    def __init__(
        self, tvm: Any, program: Program, module: Any, symbols: Symbols, nodes: Sequence[onnx.NodeProto]
    ) -> None:
        self._nodes = nodes  # of the model, to name one that cannot be exported
        self._relax, self._program, self._module, self._symbols = tvm.relax, program, module, symbols
        self._constant_type, self._number_type = tvm.ir.expr.GenericConst, tvm.ir.PrimType
        self._values: dict[Any, Any] = {}
        self._constants: dict[Any, Operand] = {}
        self._own: set[Operand] = set()  # buffers that hold one value alone: those of outputs

    def read(self, main: Any) -> None:
        for index, parameter in enumerate(main.params):
            self._values[parameter] = Operand("input", index)
        for block in main.body.blocks:
            for binding in block.bindings:
                self._values[binding.var] = self._binding(binding.value)
        result = self._value(main.body.body)
        outputs = result if isinstance(result, tuple) else (result,)
        types = main.body.body.ty
        fields = list(types.fields) if hasattr(types, "fields") else [types]
        self._return(outputs, fields)

    def _value(self, expression: Any) -> Any:
        relax = self._relax
        if isinstance(expression, self._constant_type):
            return self._constant(expression)
        if isinstance(expression, relax.Tuple):
            return tuple(self._value(field) for field in expression.fields)
        if isinstance(expression, relax.TupleGetItem):
            return self._value(expression.tuple_value)[int(expression.index)]
        if isinstance(expression.ty, self._number_type):
            return Operand("number", 0, self._symbols.count(expression))
        return self._values[expression]

    def _constant(self, constant: Any) -> Operand:
        if constant not in self._constants:
            self._constants[constant] = Operand("constant", len(self._program.constants))
            self._program.constants.append(constant.value.numpy())
        return self._constants[constant]

    def _binding(self, value: Any) -> Any:
        relax = self._relax
        if not isinstance(value, relax.Call):
            return self._value(value)
        name = value.op.name if hasattr(value.op, "name") else ""
        if name == "relax.memory.alloc_storage":
            return self._buffer(self._symbols.count(value.args[0].values[0]).most)
        if name == "relax.memory.alloc_tensor":
            return self._values[value.args[0]]
        if name == "relax.builtin.alloc_tensor":
            shape = [self._symbols.count(size) for size in value.args[0].values]
            found = self._buffer(product(shape).most * np.dtype(value.args[1].value).itemsize)
            self._own.add(found)
            return found
        if name in ("relax.reshape", "relax.memory.view"):
            return self._value(value.args[0])
        operands: list[Operand] = []
        for argument in value.args:
            found = self._value(argument)
            operands.extend(found if isinstance(found, tuple) else (found,))
        if isinstance(value.op, relax.ExternFunc):
            symbol = str(value.op.global_symbol)
            if not symbol.startswith(_SITE):
                raise UnsupportedError(self._needs_run_time(symbol))
            step = Step("", "", tuple(operands), site=int(symbol.removeprefix(_SITE)))
            step = replace(step, shape=tuple(self._symbols.count(size) for size in value.args[0].ty.shape))
        elif hasattr(value.op, "name_hint"):
            symbol = str(value.op.name_hint)
            operands += self._dimensions(self._module[value.op], value.args)
            step = Step(symbol, f"op_{symbol}", tuple(operands))
        else:
            raise UnsupportedError(self._needs_run_time(name))
        self._program.steps.append(step)
        return ()

    def _needs_run_time(self, name: str) -> str:
        kind = name.rpartition(".")[2]
        nodes = [_named(node) for node in self._nodes if node.op_type.lower() == kind.replace("_", "")]
        where = f"node {', '.join(nodes)}: " if nodes else ""
        return f"{where}{name} needs a run time that gives memory, which a package does not have"

    def _dimensions(self, function: Any, arguments: Sequence[Any]) -> list[Operand]:
        """The sizes that a function reads off the shapes of its arguments: they become parameters of it."""
        found = []
        for _, place, axis in _size_variables(function):
            count = self._symbols.count(arguments[place].ty.shape[axis])
            found.append(Operand("number", 0, count))
        return found

    def _buffer(self, nbytes: int) -> Operand:
        self._program.buffers.append(nbytes)
        return Operand("buffer", len(self._program.buffers) - 1)

    def _return(self, outputs: Sequence[Operand], types: Sequence[Any]) -> None:
        """What lies in a buffer of its own is written to the output straight away; all else is copied at the end."""
        program = self._program
        moved: dict[Operand, Operand] = {}
        for index, (value, kind) in enumerate(zip(outputs, types, strict=True)):
            shape = tuple(self._symbols.count(size) for size in kind.shape)
            tensor = Tensor("", shape, np.dtype(str(kind.dtype)))
            program.outputs.append(tensor)
            output = Operand("output", index)
            if value in self._own and value not in moved:
                moved[value] = output
                program.buffers[value.index] = 0
            else:
                program.steps.append(Step(f"copy to output {index}", "", (value, output), shape=(tensor.nbytes,)))
        program.steps = [
            replace(step, operands=tuple(moved.get(operand, operand) for operand in step.operands))
            for step in program.steps
        ]


def _size_variables(function: Any) -> list[tuple[Any, int, int]]:
    """The variables in the shapes of a function's buffers: each with a parameter and an axis that it is the size of."""
    given = [parameter for parameter in function.params if not hasattr(parameter.ty, "shape")]
    found: list[tuple[Any, int, int]] = []
    for place, parameter in enumerate(function.params):
        for axis, size in enumerate(getattr(parameter.ty, "shape", ())):
            if type(size).__name__ == "Var" and not any(size.same_as(v) for v in (*given, *(v for v, _, _ in found))):
                found.append((size, place, axis))
    return found


# -- from TIR to objects ----------------------------------------------------------------------------------------------


def _compile(tvm: Any, program: Program, module: Any, target: Mapping[str, Any]) -> None:
    """Compile the functions that steps call; arrays inside of them become operands in planned memory."""
    from tvm import tirx

    called = {step.label for step in program.steps if step.function}
    functions = {v: f for v, f in module.functions_items() if isinstance(f, tirx.PrimFunc) and v.name_hint in called}
    if not functions:
        return
    host = tvm.target.Target(dict(target))
    host = host.with_host(host)
    functions = {variable: scheduled(tvm, function) for variable, function in functions.items()}
    lowered = _lower_functions(tvm, tvm.IRModule(functions), host)
    plain, scratch = {}, {}
    for variable, function in lowered.functions_items():
        name = variable.name_hint
        calls = [step.operands for step in program.steps if step.function and step.label == name]
        plain[f"op_{name}"], scratch[name] = _with_pointers(tvm, function, calls)
    built = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in plain.items()})
    built = tirx.transform.LowerIntrin()(tirx.transform.BindTarget(host)(built))
    compiled = tvm.get_global_func("target.build.llvm")(built, host)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rest.o"
        compiled.write_to_file(str(path))
        program.objects = path.read_bytes(), str(compiled.inspect_source("asm"))
    _place_scratch(program, scratch)


def _lower_functions(tvm: Any, module: Any, host: Any) -> Any:
    """TVM's usual passes up to, and not including, those that make functions of its own calling convention."""
    s, x = tvm.s_tir.transform, tvm.tirx.transform
    passes = [
        x.BindTarget(host),
        s.CanonicalizeLoop(),
        s.LowerInitBlock(),
        s.PlanAndUpdateBufferAllocationLocation(),
        s.ConvertBlocksToOpaque(),
        s.CompactBufferAllocation(),
        s.LowerMatchBuffer(),
        s.StmtSimplify(),
        s.AnnotateIrregularLoop(),
        s.LowerOpaqueBlock(),
        x.FlattenBuffer(),
        x.NarrowDataType(32),
        s.LoopPartition(),
        x.VectorizeLoop(True),
        x.StorageRewrite(),
        s.HoistIfThenElse(),
        x.UnrollLoop(),
        s.RenormalizeSplitPattern(),
        x.StmtSimplify(),
        x.RemoveNoOp(),
        s.RewriteUnsafeSelect(),
        x.CommonSubexprElim(),
    ]
    for each in passes:
        module = each(module)
    return module


def _with_pointers(tvm: Any, function: Any, calls: Sequence[Sequence[Operand]]) -> tuple[Any, list[int]]:
    """The function with bare pointers for its buffers and its large arrays, and the most bytes of the latter.

    Its parameters are its buffers and numbers, the sizes that it read off the buffers' shapes, and the arrays.
    """
    from tvm import tirx
    from tvm.sym import Analyzer

    analyzer = Analyzer()
    numbers = [variable for variable, _, _ in _size_variables(function)]
    for place, variable in enumerate([*function.params, *numbers]):
        counts = [count for operands in calls if (count := operands[place].count) is not None]
        if counts:
            bind_range(analyzer, variable, min(c.least for c in counts), max(c.most for c in counts))

    def pointer(buffer: Any, name: str) -> Any:
        return tirx.Var(name, tvm.ir.PointerType(tvm.ir.PrimType(str(buffer.dtype))))

    given = [
        pointer(parameter, parameter.name) if hasattr(parameter.ty, "shape") else parameter
        for parameter in function.params
    ]
    arrays: list[Any] = []
    sizes: list[int] = []

    def declared(statement: Any) -> Any:
        for parameter, own in zip(function.params, given, strict=True):
            if isinstance(statement.data, tvm.ir.Call) and statement.data.args[0].same_as(parameter):
                return tirx.DeclBuffer(statement.buffer, data=own)
        return statement

    def allocated(statement: Any) -> Any:
        buffer = statement.buffer
        scalar, _, lanes = str(buffer.dtype).partition("x")
        nbytes = np.dtype(scalar).itemsize * int(lanes or 1)
        for size in buffer.shape:
            nbytes *= int(analyzer.const_int_bound(size).max_value)
        if nbytes <= _SMALL and all(isinstance(_number(size), int) for size in buffer.shape):
            return statement
        arrays.append(pointer(buffer, f"array_{len(arrays)}"))
        sizes.append(nbytes)
        return tirx.DeclBuffer(buffer, data=arrays[-1])

    def rewritten(statement: Any) -> Any:
        if isinstance(statement, tirx.SeqStmt):
            return tirx.SeqStmt([rewritten(inner) for inner in statement.seq])
        if isinstance(statement, tirx.For):
            s = statement
            return tirx.For(
                s.loop_var, s.min, s.extent, s.kind, rewritten(s.body), s.thread_binding, s.annotations, s.step
            )
        if isinstance(statement, tirx.IfThenElse):
            other = None if statement.else_case is None else rewritten(statement.else_case)
            return tirx.IfThenElse(statement.condition, rewritten(statement.then_case), other)
        if isinstance(statement, tirx.AttrStmt):
            return tirx.AttrStmt(statement.node, statement.attr_key, statement.value, rewritten(statement.body))
        if isinstance(statement, tirx.Bind):
            analyzer.bind(statement.var, statement.value)
        if isinstance(statement, tirx.DeclBuffer):
            return declared(statement)
        return allocated(statement) if isinstance(statement, tirx.AllocBuffer) else statement

    body = rewritten(function.body)
    made = tirx.PrimFunc([*given, *numbers, *arrays], body, function.ret_type)
    return made.with_attr("tirx.noalias", True), sizes


def _place_scratch(program: Program, scratch: Mapping[str, Sequence[int]]) -> None:
    """Buffers for the arrays inside of functions: the same for all steps, since one runs at a time."""
    shared: list[int] = []
    for sizes in scratch.values():
        for place, nbytes in enumerate(sizes):
            if place == len(shared):
                shared.append(nbytes)
            shared[place] = max(shared[place], nbytes)
    first = len(program.buffers)
    program.buffers += shared
    for number, step in enumerate(program.steps):
        sizes = scratch.get(step.label, ()) if step.function else ()
        extra = tuple(Operand("buffer", first + place) for place in range(len(sizes)))
        program.steps[number] = replace(step, operands=(*step.operands, *extra))

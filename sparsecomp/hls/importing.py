"""A network from an ONNX model in QDQ form: between two quantised values lies one layer.

The model is a chain: linears (`Gemm`, `MatMul`, with a bias and ReLU or Clip), convolutions, poolings, and functions of
one value. A function, of whatever standard operations it consists, is evaluated by ONNX Runtime for all 256 values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper

from sparsecomp.hls.constants import Constants, attribute
from sparsecomp.hls.network import HIGH, LOW, Integers, Layer, Linear, Lookup, Network, Patches, Pool, Requantise, Shape

_LINEAR = ("Gemm", "MatMul", "Conv")
_POOL = ("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean")
_RESHAPE = ("Reshape", "Flatten", "Identity", "Squeeze", "Unsqueeze")
_FUNCTIONS = (
    *("Abs", "Add", "Cast", "Clip", "Constant", "Div", "Elu", "Erf", "Exp", "Gelu"),
    *("HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg"),
    *("Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt", "Sub", "Tanh"),
)
_LARGEST = 1 << 24
"""Weights of a layer, with the zeros of a grouped convolution: more is not a design for an FPGA."""


@dataclass
class _Stream:
    """The value that is followed through the graph.

    Attributes:
        value: its name, before DequantizeLinear.
        scale, zero: of it; the zero point as int8.
        shape: as a stream.
        flat: whether a picture was made one vector, channels first.
    """

    value: str
    scale: float
    zero: int
    shape: Shape
    flat: bool = False


def network_of(model: ir.Model, title: str, vectors: int = 1) -> Network:
    """Read a model that `sparsecomp.frontends.onnx_load.load` gave.

    Args:
        model: in QDQ form.
        title: what errors call it.
        vectors: rows of one call, where the model leaves them open.

    Raises:
        ValueError: an operation or a value is not supported; the message names the node.
    """
    return _Import(ir.to_proto(model), title, vectors).run()


class _Import:
    def __init__(self, proto: onnx.ModelProto, title: str, vectors: int) -> None:
        self.graph, self.title = proto.graph, title
        self.opsets = list(proto.opset_import)
        self.constants = Constants(proto.graph)
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in proto.graph.node:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        self.vectors = vectors
        self.layers: list[Layer] = []

    def run(self) -> Network:
        known = {tensor.name for tensor in self.graph.initializer}
        inputs = [value for value in self.graph.input if value.name not in known]
        if len(inputs) != 1 or len(self.graph.output) != 1:
            raise ValueError(
                f"{self.title}: a design has one input and one output, the model {len(inputs)} and "
                f"{len(self.graph.output)}: export the part between them"
            )
        shape = self._input_shape(inputs[0])
        node = self._reader(inputs[0].name)
        value = inputs[0].name
        if node.op_type == "QuantizeLinear":
            value, node = node.output[0], self._reader(node.output[0])
        if node.op_type != "DequantizeLinear":
            raise self._unquantised(node)
        scale, zero, low = self.constants.parameters(node)
        stream = _Stream(value, scale, zero - low + LOW, shape)
        first = stream
        end = self.graph.output[0].name
        while True:
            begin = self._reader(stream.value)
            if begin.op_type != "DequantizeLinear":
                raise self._unquantised(begin)
            if begin.output[0] == end:
                break
            stream = self._layer(stream, begin.output[0])
            if stream.value == end:
                break
        if not self.layers:
            raise ValueError(f"{self.title} has no layer between its input and its output")
        return Network(shape, tuple(self.layers), (first.scale, stream.scale), (first.zero, stream.zero))

    def _input_shape(self, value: onnx.ValueInfoProto) -> Shape:
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if len(sizes) == 4 and min(sizes[1:]) > 0:
            return Shape(sizes[2] * sizes[3], sizes[1], sizes[2])
        if len(sizes) == 3 and min(sizes[1:]) > 0 and self._one_dimensional():
            return Shape(sizes[2], sizes[1], 1)
        if len(sizes) in (2, 3) and sizes[-1] > 0:
            return Shape(prod(size or self.vectors for size in sizes[:-1]), sizes[-1])
        raise ValueError(
            f"{self.title}: input {value.name!r} has sizes {sizes}; expected [rows, values], [1, channels, "
            f"steps] or [1, channels, height, width], with all but the first known"
        )

    def _one_dimensional(self) -> bool:
        """Whether windows lie along one axis: then a picture of one row is read, and not rows of values."""
        weights = [node.input[1] for node in self.graph.node if node.op_type == "Conv"]
        return any(name in self.constants and self.constants.array(name).ndim == 3 for name in weights)

    def _reader(self, value: str) -> onnx.NodeProto:
        readers = self.readers.get(value, [])
        if len(readers) != 1:
            raise ValueError(
                f"{self.title}: value {value!r} is read by {len(readers)} nodes; a design is a chain of layers: export "
                f"the part of the model that is one"
            )
        return readers[0]

    def _unquantised(self, node: onnx.NodeProto) -> ValueError:
        return ValueError(
            f"{self.title}: node {node.name!r} ({node.op_type}) reads a value that is not quantised; expected "
            f"DequantizeLinear: give calibration data, so that the model is quantised here, or one in QDQ form"
        )

    def _layer(self, stream: _Stream, value: str) -> _Stream:
        """The nodes up to the next QuantizeLinear as a layer; what the stream is after it."""
        first = self.readers[value]
        if any(node.op_type in (*_LINEAR, *_POOL, *_RESHAPE) for node in first):
            chain, end = self._chain(value)
            if stream.shape.height == 1 and len(chain) > 1 and chain[0].op_type == "Unsqueeze":
                chain = chain[1:]  # the one row, made an axis for a pooling
            after = self._after(stream, end)
            kind = chain[0].op_type if chain else ""
            if kind in _RESHAPE:
                self._reshape(stream, after, chain)
            elif kind in _POOL:
                self._pool(stream, after, chain)
            else:
                self._linear(stream, after, chain)
            return after
        nodes, end = self._function(value)
        after = self._after(stream, end)
        after.shape, after.flat = stream.shape, stream.flat
        table = self._table(stream, value, nodes, end)
        if not np.array_equal(table, np.arange(LOW, HIGH + 1)):
            self.layers.append(Lookup(nodes[0].name or nodes[0].op_type if nodes else end.name, table, after.zero))
        return after

    def _after(self, stream: _Stream, end: onnx.NodeProto) -> _Stream:
        scale, zero, low = self.constants.parameters(end)
        return _Stream(end.output[0], scale, zero - low + LOW, stream.shape)

    def _chain(self, value: str) -> tuple[list[onnx.NodeProto], onnx.NodeProto]:
        chain: list[onnx.NodeProto] = []
        while True:
            node = self._reader(value) if value not in {out.name for out in self.graph.output} else None
            if node is None:
                raise ValueError(
                    f"{self.title}: the output of {chain[-1].name!r} is not quantised; expected QuantizeLinear after it"
                )
            if node.op_type == "QuantizeLinear":
                return chain, node
            chain.append(node)
            value = node.output[0]

    def _function(self, value: str) -> tuple[list[onnx.NodeProto], onnx.NodeProto]:
        """The nodes of a function of one value, in order, and the QuantizeLinear after it."""
        inside, ends = {value}, []
        nodes = []
        for node in self.graph.node:
            sources = [name for name in node.input if name and name not in self.constants]
            if not inside.intersection(sources):
                continue
            if node.op_type == "QuantizeLinear":
                ends.append(node)
                continue
            constants = [name for name in node.input if name and name in self.constants]
            scalar = all(self.constants.array(name).size == 1 for name in constants)
            if node.op_type not in _FUNCTIONS or not inside.issuperset(sources) or not scalar:
                raise self._unsupported(node)
            nodes.append(node)
            inside.update(node.output)
        if len(ends) != 1:
            last = nodes[-1].name if nodes else value
            raise ValueError(f"{self.title}: {last!r} is followed by {len(ends)} QuantizeLinear, expected one")
        return nodes, ends[0]

    def _unsupported(self, node: onnx.NodeProto) -> ValueError:
        return ValueError(
            f"{self.title}: node {node.name!r} ({node.op_type}) cannot be exported to HLS; what can: a chain of Gemm, "
            f"MatMul, Conv, MaxPool, AveragePool, GlobalAveragePool, Flatten, and functions of one value"
        )

    def _table(self, stream: _Stream, value: str, nodes: Sequence[onnx.NodeProto], end: onnx.NodeProto) -> Integers:
        """What a function gives for -128 to 127, by ONNX Runtime."""
        _, _, low = self.constants.parameters(end)
        kind = TensorProto.INT8 if low == LOW else TensorProto.UINT8
        x = np.arange(LOW, HIGH + 1)
        real = ((x - stream.zero) * np.float32(stream.scale)).astype(np.float32)
        used = dict.fromkeys(name for node in [*nodes, end] for name in node.input if name and name in self.constants)
        tensors = [onnx.numpy_helper.from_array(self.constants.array(name), name) for name in used]
        graph = helper.make_graph(
            [*nodes, end],
            "function",
            [helper.make_tensor_value_info(value, TensorProto.FLOAT, [256])],
            [helper.make_tensor_value_info(end.output[0], kind, [256])],
            tensors,
        )
        model = helper.make_model(graph, opset_imports=self.opsets, ir_version=10)
        try:
            session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
            (result,) = session.run(None, {value: real})
        except Exception as error:  # whatever ONNX Runtime raises for a model that it does not take
            names = ", ".join(node.op_type for node in nodes)
            raise ValueError(f"{self.title}: ONNX Runtime cannot evaluate {names}: {error}") from error
        return np.asarray(result).astype(np.int64) - low + LOW

    def _reshape(self, stream: _Stream, after: _Stream, chain: Sequence[onnx.NodeProto]) -> None:
        for node in chain:
            if node.op_type not in _RESHAPE:
                raise self._unsupported(node)
        self._check_same_scale(stream, after, chain[0])
        # What a picture becomes is seen where it is read: by a linear as one vector.
        after.flat = stream.flat or stream.shape.height > 0

    def _check_same_scale(self, stream: _Stream, after: _Stream, node: onnx.NodeProto) -> None:
        if (stream.scale, stream.zero) != (after.scale, after.zero):
            raise ValueError(
                f"{self.title}: node {node.name!r} ({node.op_type}) changes the scale from {stream.scale:g} to "
                f"{after.scale:g}; expected the same before and after"
            )

    def _pool(self, stream: _Stream, after: _Stream, chain: Sequence[onnx.NodeProto]) -> None:
        node = chain[0]
        for other in chain[1:]:
            if other.op_type not in _RESHAPE:
                raise self._unsupported(other)
        if not stream.shape.height or stream.flat:
            raise ValueError(f"{self.title}: node {node.name!r} ({node.op_type}) pools what is no picture")
        name = node.name or node.op_type
        whole = node.op_type == "GlobalAveragePool" or self._is_mean_of_pictures(node, stream)
        if whole:
            kernel = (stream.shape.height, stream.shape.columns)
            patches = Patches(kernel, (1, 1), (0, 0, 0, 0), (1, 1), stream.zero)
        else:
            average = node.op_type == "AveragePool"
            patches = self._patches(node, stream, stream.zero if average else LOW)
            if attribute(node, "ceil_mode", 0) or (
                average and any(patches.pads) and not attribute(node, "count_include_pad", 0)
            ):
                raise ValueError(
                    f"{self.title}: node {name!r} ({node.op_type}): ceil_mode, and means that leave out the padding, "
                    f"are not supported"
                )
        if node.op_type == "MaxPool":
            self._check_same_scale(stream, after, node)
            self.layers.append(Pool(name, patches))
        else:
            rule = Requantise.of(np.array([stream.scale / (after.scale * patches.taps)]), after.zero)
            self.layers.append(Pool(name, patches, -stream.zero * patches.taps, rule))
        after.shape = self.layers[-1].out(stream.shape)
        after.flat = len(chain) > 1 or (node.op_type == "ReduceMean" and not attribute(node, "keepdims", 1))

    def _is_mean_of_pictures(self, node: onnx.NodeProto, stream: _Stream) -> bool:
        """Whether a node is the mean over all pixels, as PyTorch exports an adaptive pooling."""
        if node.op_type != "ReduceMean":
            return False
        axes = attribute(node, "axes", None)
        if axes is None and len(node.input) > 1 and node.input[1] in self.constants:
            axes = self.constants.array(node.input[1]).reshape(-1).tolist()
        pixels = ({2, 3}, {-2, -1}) if stream.shape.height > 1 else ({2, 3}, {-2, -1}, {2}, {-1})
        if axes is None or set(axes) not in pixels:
            raise ValueError(
                f"{self.title}: node {node.name!r} (ReduceMean) takes the mean over axes {axes}; expected that over "
                f"all pixels of a picture"
            )
        return True

    def _linear(self, stream: _Stream, after: _Stream, chain: Sequence[onnx.NodeProto]) -> None:
        node = chain[0]
        name = node.name or node.output[0]
        weight, scales, bias, patches = self._weight(node, name, stream)
        low, high = LOW, HIGH
        for other in chain[1:]:
            if other.op_type == "Add" and (low, high) == (LOW, HIGH):
                given = [source for source in other.input if source in self.constants]
                if len(given) != 1:
                    raise self._unsupported(other)
                term = self.constants.array(given[0]).astype(np.float64).reshape(-1)
                bias = bias + np.broadcast_to(term, bias.shape)
            elif other.op_type in ("Relu", "Clip"):
                least, most = self._range(other)
                low = max(low, round(least / after.scale) + after.zero if least > -1e30 else LOW)
                high = min(high, round(most / after.scale) + after.zero if most < 1e30 else HIGH)
            elif other.op_type not in _RESHAPE:
                raise ValueError(
                    f"{self.title}: node {other.name!r} ({other.op_type}) follows {name!r} without a quantised value "
                    f"between them; expected QuantizeLinear and DequantizeLinear"
                )
        order, width = None, stream.shape.width
        if patches is None and stream.flat:
            width = stream.shape.values
            order = np.arange(width).reshape(stream.shape.width, stream.shape.vectors).T.reshape(-1)
        if node.op_type != "Conv" and stream.shape.height and not stream.flat:
            raise ValueError(
                f"{self.title}: layer {name!r} ({node.op_type}) reads a picture; expected Flatten before it"
            )
        if patches is None and weight.shape[1] != width:
            raise ValueError(f"{self.title}: layer {name!r} reads {weight.shape[1]} values, given {width}")
        rounded = np.rint(bias / (stream.scale * scales))
        if np.any(np.abs(rounded) >= 2**31):
            raise ValueError(f"{self.title}: layer {name!r}: a bias of {np.abs(bias).max():g} is beyond 32 bits")
        whole = rounded.astype(np.int64) - stream.zero * weight.sum(axis=1)
        try:
            rule = Requantise.of(stream.scale * scales / after.scale, after.zero, max(low, LOW), min(high, HIGH))
        except ValueError as error:
            raise ValueError(f"{self.title}: layer {name!r}: {error}") from error
        made = Linear(name, weight, whole, rule, patches, order)
        self.layers.append(made)
        after.shape = made.out(stream.shape)
        after.flat = any(other.op_type in _RESHAPE for other in chain)

    def _range(self, node: onnx.NodeProto) -> tuple[float, float]:
        if node.op_type == "Relu":
            return 0.0, float("inf")
        limits = [-float("inf"), float("inf")]
        for at, key in enumerate(("min", "max")):
            if len(node.input) > at + 1 and node.input[at + 1]:
                if node.input[at + 1] not in self.constants:
                    raise self._unsupported(node)
                limits[at] = float(self.constants.array(node.input[at + 1]).reshape(()))
            limits[at] = float(attribute(node, key, limits[at]))
        return limits[0], limits[1]

    def _weight(
        self, node: onnx.NodeProto, name: str, stream: _Stream
    ) -> tuple[Integers, npt.NDArray[np.float64], npt.NDArray[np.float64], Patches | None]:
        """Weight `[O, I]`, its scales `[O]`, the real bias `[O]`, and a convolution's patches."""
        if node.input[1] not in self.constants:
            raise ValueError(f"{self.title}: layer {name!r} ({node.op_type}) has no constant weight")
        try:
            given = self.constants.quantised(node.input[1])
        except ValueError as error:
            raise ValueError(f"{self.title}: layer {name!r}: {error}") from error
        weight = given.int8(name)
        outputs_at = 0
        if node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0)):
            outputs_at = 1
        if node.op_type == "Gemm" and (
            attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1
        ):
            raise ValueError(f"{self.title}: layer {name!r}: Gemm with transA, alpha or beta is not supported")
        if given.scale.size > 1 and given.axis % weight.ndim != outputs_at:
            raise ValueError(f"{self.title}: layer {name!r}: scales lie along inputs; expected one for each output")
        patches = None
        if node.op_type == "Conv":
            if weight.ndim == 3:  # along one axis: of a picture of one row
                weight = weight[:, :, None]
            if not stream.shape.height or stream.flat or weight.ndim != 4:
                raise ValueError(f"{self.title}: layer {name!r} is a convolution of what is no picture")
            patches = self._patches(node, stream, stream.zero)
            weight = _ungrouped(weight, int(attribute(node, "group", 1)), name)
            if weight.shape[1] != stream.shape.width * patches.taps:
                raise ValueError(
                    f"{self.title}: layer {name!r} does not fit a picture of {stream.shape.width} channels"
                )
            if patches.is_pixel:  # then it is a linear of every pixel, and needs no windows
                patches = None
        elif weight.ndim != 2:
            raise ValueError(f"{self.title}: layer {name!r} ({node.op_type}) has a weight of {weight.ndim} dimensions")
        else:
            weight = weight.T if outputs_at else weight
        scales = np.broadcast_to(given.scale, (len(weight),)).copy()
        bias = np.zeros(len(weight))
        if len(node.input) > 2 and node.input[2]:
            if node.input[2] not in self.constants:
                raise ValueError(f"{self.title}: layer {name!r}: the bias is not a constant")
            bias = np.broadcast_to(self.constants.array(node.input[2]).astype(np.float64).reshape(-1), bias.shape)
        return np.ascontiguousarray(weight), scales, bias, patches

    def _patches(self, node: onnx.NodeProto, stream: _Stream, fill: int) -> Patches:
        kernel = attribute(node, "kernel_shape", None)
        if kernel is None:
            kernel = self.constants.array(node.input[1]).shape[2:]
        rank = len(kernel)
        strides = tuple(int(size) for size in attribute(node, "strides", (1,) * rank))
        dilations = tuple(int(size) for size in attribute(node, "dilations", (1,) * rank))
        pads = tuple(int(size) for size in attribute(node, "pads", (0,) * (2 * rank)))
        if rank == 1 and (len(strides), len(dilations), len(pads)) == (1, 1, 2):
            kernel, strides, dilations, pads = (1, *kernel), (1, *strides), (1, *dilations), (0, pads[0], 0, pads[1])
        kernel = (int(kernel[0]), int(kernel[1])) if len(kernel) == 2 else (0, 0)
        auto = attribute(node, "auto_pad", "NOTSET")
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            pads = _same(auto, (stream.shape.height, stream.shape.columns), kernel, strides, dilations)
        if len(strides) != 2 or len(dilations) != 2 or len(pads) != 4 or min(*kernel, *strides, *dilations) < 1:
            raise ValueError(f"{self.title}: node {node.name!r} ({node.op_type}): expected a window of one or two axes")
        patches = Patches(
            kernel, (strides[0], strides[1]), (pads[0], pads[1], pads[2], pads[3]), (dilations[0], dilations[1]), fill
        )
        if min(pads) < 0 or min(patches.out(stream.shape)) < 1:
            raise ValueError(
                f"{self.title}: node {node.name!r} ({node.op_type}): its window is larger than the picture"
            )
        return patches


def _same(
    auto: str, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[int, ...]:
    begins, ends = [], []
    for size, taps, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + dilation * (taps - 1) + 1 - size)
        small, large = total // 2, total - total // 2
        begins.append(small if auto == "SAME_UPPER" else large)
        ends.append(large if auto == "SAME_UPPER" else small)
    return (*begins, *ends)


def _ungrouped(weight: Integers, groups: int, name: str) -> Integers:
    """A convolution's weight `[O, I / groups, kh, kw]` as `[O, I * taps]`, with zeros for inputs of other groups."""
    outputs, inputs, taps = weight.shape[0], weight.shape[1], weight.shape[2] * weight.shape[3]
    if groups < 1 or outputs % groups:
        raise ValueError(f"layer {name!r}: {outputs} outputs in {groups} groups")
    if outputs * inputs * groups * taps > _LARGEST:
        raise ValueError(f"layer {name!r} has {outputs * inputs * groups * taps} weights, at most {_LARGEST} are taken")
    spread = np.zeros((outputs, groups, inputs * taps), np.int64)
    own = np.arange(outputs) // (outputs // groups)
    spread[np.arange(outputs), own] = weight.reshape(outputs, -1)
    return spread.reshape(outputs, -1)

"""Loads damaged models with a library of operations for a while: `python ort_fuzz.py SECONDS SEED MODEL...`.

Every error of ONNX Runtime is fine; what is not ends the process. The library of MODEL.onnx is MODEL.so.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

TYPES = (np.float32, np.int32, np.uint8, np.uint16, np.int64)
NUMBERS = (-(2**31), -1, 0, 1, 2, 255, 2**16 - 1, 2**16, 2**31 - 1)


def damaged(content: bytes, order: random.Random) -> onnx.ModelProto:
    """A model with some entries, sizes or types of its constants, or attributes of its nodes, changed."""
    model = onnx.load_from_string(content)
    del model.functions[:]  # whatever the function would do with it: the library has to look by itself
    for _ in range(order.randint(1, 3)):
        what = order.choice(("entry", "entry", "entry", "size", "attribute", "type", "bias"))
        if what == "attribute":
            attribute = order.choice(list(model.graph.node[0].attribute))
            attribute.i = order.choice((attribute.i + order.randint(-4, 4), order.choice(NUMBERS), 2**62))
            continue
        tensor = order.choice(list(model.graph.initializer))
        array = numpy_helper.to_array(tensor).copy()
        if what == "type":
            with np.errstate(invalid="ignore"):
                array = array.astype(order.choice(TYPES))
        elif what == "size":
            array = np.resize(array.reshape(-1), order.randint(0, array.size + 5))
        elif array.size:
            place = order.randrange(array.size)
            value = int(array.reshape(-1)[place]) if array.dtype.kind in "iu" else 0
            value = order.choice((value + order.randint(-3, 3), order.choice(NUMBERS)))
            most = int(np.iinfo(array.dtype).max) if array.dtype.kind == "u" else 2**31 - 1
            array.reshape(-1)[place] = value & most if array.dtype.kind == "u" else min(max(value, -(2**31)), most)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


def input_for(session: Any, order: random.Random) -> dict[str, Any]:
    """An input of a size that the model may not expect."""
    (value,) = session.get_inputs()
    shape = [size if isinstance(size, int) else order.choice((0, 1, 3, 17)) for size in value.shape]
    return {value.name: np.ones(shape, np.float32)}


def main() -> None:
    seconds, seed, *paths = sys.argv[1:]
    order = random.Random(int(seed))
    onnxruntime.set_default_logger_severity(4)
    contents = {path: Path(path).read_bytes() for path in paths}
    loaded, tried, end = 0, 0, time.monotonic() + float(seconds)
    while time.monotonic() < end:
        path = order.choice(paths)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = order.choice((1, 2))
        options.register_custom_ops_library(str(Path(path).with_suffix(".so")))
        tried += 1
        try:
            session = onnxruntime.InferenceSession(damaged(contents[path], order).SerializeToString(), options)
            loaded += 1
            for _ in range(3):
                session.run(None, input_for(session, order))
        except Exception as error:
            if not type(error).__module__.startswith("onnxruntime"):
                raise
    print(f"{tried} models, {loaded} loaded")


if __name__ == "__main__":
    main()

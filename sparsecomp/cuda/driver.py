"""Kernels on a card: the few calls of NVIDIA's driver that load a cubin and start what is in it.

The library of the driver comes with the card's driver, so nothing has to be installed. Names and meanings of the calls
are those of the CUDA Driver API (NVIDIA).
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsecomp.cuda.library import Launch

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_LARGE_SHARED = 48 << 10  # bytes of dynamic shared memory that need no asking


class DriverError(RuntimeError):
    """The driver refused a call; the message has its reason."""


@functools.cache
def driver() -> ctypes.CDLL:
    """NVIDIA's driver library.

    Raises:
        DriverError: there is none on this machine.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"NVIDIA's driver is not installed here ({error})") from error


class Function:
    """A kernel of a cubin, loaded on each card where it is launched.

    Args:
        image: the cubin.
        entry: name of the kernel in it.
    """

    def __init__(self, image: bytes, entry: str) -> None:
        self._image, self._entry = image, entry
        self._loaded: dict[int, tuple[ctypes.c_void_p, ctypes.c_void_p]] = {}
        self._lock = threading.Lock()

    def __call__(self, launch: Launch, arguments: Sequence[Tensor | int | None], device: torch.device) -> None:
        """Start the kernel on PyTorch's current stream of a card; does not wait for it.

        Args:
            launch: the geometry.
            arguments: in the order of the kernel: tensors of that card (None: a null pointer), and int32 numbers.
            device: the card, with its index.

        Raises:
            DriverError: the driver refuses it.
        """
        values = [_value(given) for given in arguments]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        index = device.index
        with torch.cuda.device(index), self._lock:
            context, function = self._loaded.get(index) or self._load(index)
            # A thread that PyTorch has computed nothing in yet has no context.
            _check(driver().cuCtxSetCurrent(context), "choosing the card")
            if launch.shared > _LARGE_SHARED:
                code = driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, launch.shared)
                _check(code, f"asking for {launch.shared} bytes of shared memory")
            stream = ctypes.c_void_p(torch.cuda.current_stream(index).cuda_stream)
            code = driver().cuLaunchKernel(function, *launch.grid, *launch.block, launch.shared, stream, places, None)
        _check(code, f"launching {self._entry} with grid {launch.grid} and block {launch.block}")

    def _load(self, index: int) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
        """The primary context of a card, which is PyTorch's too, and the kernel in it."""
        device, context = ctypes.c_int(), ctypes.c_void_p()
        _check(driver().cuDeviceGet(ctypes.byref(device), index), "finding the card")
        _check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "taking the card's context")
        _check(driver().cuCtxSetCurrent(context), "choosing the card")
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver().cuModuleLoadData(ctypes.byref(module), self._image), "loading a cubin")
        name = ctypes.c_char_p(self._entry.encode())
        _check(driver().cuModuleGetFunction(ctypes.byref(function), module, name), f"finding {self._entry}")
        self._loaded[index] = context, function
        return self._loaded[index]


def _value(given: Tensor | int | None) -> ctypes.c_int32 | ctypes.c_void_p:
    if isinstance(given, int):
        return ctypes.c_int32(given)
    return ctypes.c_void_p(None if given is None else given.data_ptr())


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise DriverError(f"{what} failed with code {code}: {(text.value or b'no description').decode()}")

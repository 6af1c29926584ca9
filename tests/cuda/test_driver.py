"""Launches by NVIDIA's driver, on one that only writes down what it is given."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsecomp.cuda import driver
from sparsecomp.cuda.library import Launch

CARD = torch.device("cuda", 1)


class Driver:
    """The calls of the driver; those in `fails` give a code."""

    def __init__(self, **fails: int) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails = fails

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> int:
            self.calls.append((name, *given))
            if name == "cuLaunchKernel":
                places = given[9]
                self.values = (
                    ctypes.c_void_p.from_address(places[0]).value,
                    ctypes.c_void_p.from_address(places[1]).value,
                    ctypes.c_int32.from_address(places[2]).value,
                )
            elif name == "cuGetErrorString":
                given[1]._obj.value = b"out of registers"
            elif name in ("cuDevicePrimaryCtxRetain", "cuModuleLoadData", "cuModuleGetFunction", "cuDeviceGet"):
                given[0]._obj.value = len(self.calls)
            return self.fails.get(name, 0)

        return call

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(driver, "driver", lambda: found)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=77))
    return found


LOAD = ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuModuleLoadData", "cuModuleGetFunction"]


def test_a_launch_gets_its_geometry_stream_and_arguments(made: Driver) -> None:
    x = torch.ones(3)
    driver.Function(b"cubin", "entry")(Launch((4, 5, 6), (128, 1, 1), 512), [x, None, -7], CARD)
    assert made.names() == [*LOAD, "cuCtxSetCurrent", "cuLaunchKernel"]
    assert made.calls[0][2] == 1
    assert made.calls[3][2] == b"cubin"
    assert made.calls[4][3].value == b"entry"
    _, function, *geometry = made.calls[-1]
    assert function.value == 5  # what cuModuleGetFunction gave
    assert tuple(geometry[:7]) == (4, 5, 6, 128, 1, 1, 512)
    assert geometry[7].value == 77
    assert made.values == (x.data_ptr(), None, -7)


def test_a_cubin_is_loaded_once_on_each_card(made: Driver) -> None:
    function, arguments = driver.Function(b"cubin", "entry"), [torch.ones(1), None, 1]
    for card in (CARD, CARD, torch.device("cuda", 0)):
        function(Launch((1, 1, 1), (32, 1, 1)), arguments, card)
    assert made.names().count("cuModuleLoadData") == 2
    assert made.names().count("cuLaunchKernel") == 3


@pytest.mark.parametrize(("shared", "asked"), [(48 << 10, False), ((48 << 10) + 16, True)])
def test_large_shared_memory_is_asked_for(made: Driver, shared: int, asked: bool) -> None:
    driver.Function(b"cubin", "entry")(Launch((1, 1, 1), (32, 1, 1), shared), [torch.ones(1), None, 1], CARD)
    wanted = [given for name, *given in made.calls if name == "cuFuncSetAttribute"]
    assert [given[1:] for given in wanted] == ([[8, shared]] if asked else [])


@pytest.mark.parametrize(("call", "text"), [
    ("cuModuleLoadData", "loading a cubin failed with code 200: out of registers"),
    ("cuModuleGetFunction", "finding entry failed"),
    ("cuLaunchKernel", r"launching entry with grid \(1, 2, 1\) and block \(32, 1, 1\) failed"),
])  # fmt: skip
def test_what_the_driver_refuses_is_said(made: Driver, call: str, text: str) -> None:
    made.fails[call] = 200
    with pytest.raises(driver.DriverError, match=text):
        driver.Function(b"cubin", "entry")(Launch((1, 2, 1), (32, 1, 1)), [torch.ones(1), None, 1], CARD)


def test_a_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> ctypes.CDLL:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", refuse)
    with pytest.raises(driver.DriverError, match="NVIDIA's driver is not installed here"):
        driver.driver.__wrapped__()

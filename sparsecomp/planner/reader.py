"""Strict reading of JSON that somebody else wrote: bounded in size, every field typed, nothing unknown let through.

A plan comes from a file that may have been edited by hand or by a stranger. What is wrong is said with the place in the
document ("sites[3].chosen.kernel") and what was expected there.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

MAX_BYTES = 16 * 2**20
MAX_ITEMS = 20_000
MAX_TEXT = 2_000
MAX_NUMBER = 2**48

T = TypeVar("T")


class DocumentError(ValueError):
    """A document is not what it should be; the message says where and what was expected."""


def read_text(path: Path, what: str) -> str:
    """The text of a regular file of at most `MAX_BYTES`.

    Raises:
        DocumentError: there is no such file (the nearest name in its folder is given), or it is too large or no UTF-8
            text.
    """
    try:
        if not path.is_file():
            raise DocumentError(f"{what}: {path} {'is not a regular file' if path.exists() else _missing(path)}")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise DocumentError(f"{what}: {path} has more than {MAX_BYTES} bytes, the most that is read")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"{what}: cannot read {path}: {error}") from error


def _missing(path: Path) -> str:
    siblings: list[str] = []
    if path.parent.is_dir():
        siblings = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"does not exist; did you mean {path.parent / near[0]}?" if near else "does not exist"


def parse_json(text: str, what: str) -> Any:
    """Parse JSON without NaN, infinities, doubled keys and deep nesting.

    Raises:
        DocumentError: the text is no such JSON.
    """
    if len(text) > MAX_BYTES:
        raise DocumentError(f"{what}: more than {MAX_BYTES} characters, the most that is read")
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
    except DocumentError as error:
        raise DocumentError(f"{what}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{what}: no valid JSON: {error}") from error


def _no_constant(name: str) -> Any:
    raise DocumentError(f"{name} is no number here; every number must be finite")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise DocumentError(f"the key {_short(doubled)} is there twice")
    return result


class Reader:
    """Reads the fields of one JSON object; `finish` refuses the fields that nobody asked for.

    Args:
        value: what should be an object.
        where: its place in the document, for messages.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise DocumentError(f"{where}: expected an object, given {_short(value)}")
        self._value: dict[str, Any] = value
        self._where = where
        self._asked: set[str] = set()

    def _take(self, key: str, optional: bool) -> Any:
        self._asked.add(key)
        if key not in self._value:
            if optional:
                return None
            raise DocumentError(f"{self.place(key)} is missing")
        return self._value[key]

    def place(self, key: str) -> str:
        """Where a field is in the document."""
        return f"{self._where}.{key}"

    def has(self, key: str) -> bool:
        """Whether the field is there and not null."""
        return self._value.get(key) is not None

    def text(self, key: str, default: str | None = None, among: Iterable[str] | None = None) -> str:
        """A string of at most `MAX_TEXT` characters, one of `among` if given."""
        value = self._take(key, default is not None)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or len(value) > MAX_TEXT:
            raise DocumentError(
                f"{self.place(key)}: expected a text of at most {MAX_TEXT} characters, given {_short(value)}"
            )
        if among is not None and value not in (names := list(among)):
            raise DocumentError(
                f"{self.place(key)}: {_short(value)} is none of {', '.join(names)}{nearest(value, names)}"
            )
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer from 0 to `MAX_NUMBER`."""
        value = self._take(key, default is not None)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_NUMBER:
            raise DocumentError(f"{self.place(key)}: expected an integer from 0 to {MAX_NUMBER}, given {_short(value)}")
        return value

    def number(self, key: str) -> float:
        """A finite number that is not negative."""
        value = self._take(key, optional=False)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_NUMBER:
            raise DocumentError(f"{self.place(key)}: expected a number from 0 to {MAX_NUMBER}, given {_short(value)}")
        if not math.isfinite(value):
            raise DocumentError(f"{self.place(key)}: expected a finite number, given {value}")
        return float(value)

    def maybe_number(self, key: str) -> float | None:
        """As `number`; None if the field is absent or null."""
        self._asked.add(key)
        return self.number(key) if self.has(key) else None

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._take(key, optional=True)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise DocumentError(f"{self.place(key)}: expected true or false, given {_short(value)}")
        return value

    def items(self, key: str, read: Callable[[Any, str], T]) -> tuple[T, ...]:
        """An array of at most `MAX_ITEMS`, each read by `read(value, place)`; empty if the field is absent."""
        value = self._take(key, optional=True)
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            given = f"{len(value)} items" if isinstance(value, list) else _short(value)
            raise DocumentError(f"{self.place(key)}: expected an array of at most {MAX_ITEMS} items, given {given}")
        return tuple(read(item, f"{self.place(key)}[{index}]") for index, item in enumerate(value))

    def integers(self, key: str) -> dict[str, int]:
        """An object of integers by name; empty if the field is absent."""
        value = self._take(key, optional=True)
        if value is None:
            return {}
        inner = Reader(value, self.place(key))
        return {name: inner.integer(name) for name in inner._value}

    def raw(self, key: str) -> Any:
        """The field as it is, for another reader."""
        return self._take(key, optional=False)

    def inner(self, key: str) -> Reader | None:
        """A reader of the object in a field; None if the field is absent or null."""
        value = self._take(key, optional=True)
        return None if value is None else Reader(value, self.place(key))

    def finish(self) -> None:
        """Refuse unknown fields.

        Raises:
            DocumentError: there is a field that was not asked for.
        """
        for key in self._value:
            if key not in self._asked:
                raise DocumentError(f"{self._where}: unknown field {_short(key)}{nearest(key, self._asked)}")


def nearest(given: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the name nearest to what was given, or nothing."""
    near = difflib.get_close_matches(given[:MAX_TEXT], sorted(names), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "an array"
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        return "a number out of range"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

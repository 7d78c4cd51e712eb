"""Takes fields out of JSON and checks them, so that what is wrong can be said with its place."""

from __future__ import annotations

import json
import math
from typing import Any


class FieldError(ValueError):
    """A field that is missing or not as it must be."""


class Fields:
    """A JSON object that knows where it stands in its file, and whose fields are checked when they are taken."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise FieldError(f"{where} is {_shown(value)}; accepted: an object")
        self.value, self.where = value, where

    def path(self, name: str) -> str:
        """Where the field `name` stands in the file."""
        return f"{self.where}.{name}" if self.where else name

    def get(self, name: str, kind: type | tuple[type, ...], accepted: str) -> Any:
        """The field `name`; `accepted` says what it must be."""
        if name not in self.value:
            raise FieldError(f"{self.path(name)} is missing; accepted: {accepted}")
        value = self.value[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise FieldError(f"{self.path(name)} is {_shown(value)}; accepted: {accepted}")
        return value

    def text(self, name: str) -> str:
        """A field that is a text."""
        return self.get(name, str, "a text")

    def optional_text(self, name: str) -> str | None:
        """As `text`; None if it is null or absent."""
        return None if self.value.get(name) is None else self.text(name)

    def number(self, name: str) -> float:
        """A field that is a number."""
        return self.get(name, (int, float), "a number")

    def optional_number(self, name: str) -> float | None:
        """As `number`; None if it is null or absent."""
        return None if self.value.get(name) is None else self.number(name)

    def positive(self, name: str) -> float:
        """As `number`, and finite and above 0."""
        value = self.number(name)
        if not (math.isfinite(value) and value > 0):
            raise FieldError(f"{self.path(name)} is {value}; accepted: a finite number above 0")
        return value

    def object(self, name: str) -> Fields:
        """A field that is an object."""
        return Fields(self.get(name, dict, "an object"), self.path(name))

    def optional_object(self, name: str) -> Fields:
        """As `object`; empty if it is null or absent."""
        return Fields({}, self.path(name)) if self.value.get(name) is None else self.object(name)

    def objects(self, name: str) -> list[Fields]:
        """A field that is a list of objects."""
        items = self.get(name, list, "a list")
        return [Fields(item, f"{self.path(name)}[{number}]") for number, item in enumerate(items)]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."

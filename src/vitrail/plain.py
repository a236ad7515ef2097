"""Dataclasses as plain JSON values, and back again with every value checked. No torch here."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from vitrail.errors import VitrailError, require

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Any) -> T:
    """Build a config dataclass from JSON values. Raises VitrailError for unknown, missing or misfitting ones."""
    hints = typing.get_type_hints(cls)
    require(isinstance(values, Mapping), f"{values!r} is no {cls.__name__}")
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise VitrailError(f"unknown {cls.__name__} field {unknown[0]!r}; was it written by a newer vitrail?")
    try:
        return cls(**{name: _convert(hints[name], value) for name, value in values.items()})
    except TypeError as error:
        raise VitrailError(f"this does not make a {cls.__name__}: {error}") from error


def _convert(kind: Any, value: Any) -> Any:
    """`value`, read from JSON, as the annotated type `kind`."""
    if isinstance(kind, types.UnionType):
        return None if value is None else _convert(next(k for k in kind.__args__ if k is not type(None)), value)
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value)
    if typing.get_origin(kind) is tuple:
        require(isinstance(value, list | tuple), f"{value!r} is no list")
        return tuple(_convert(kind.__args__[0], item) for item in value)
    if typing.get_origin(kind) is Literal:
        require(value in kind.__args__, f"{value!r} is none of {', '.join(map(repr, kind.__args__))}")
        return value
    accepted = (int, float) if kind is float else kind
    # To Python a bool is a whole number too.
    fits = isinstance(value, accepted) and (kind is bool) == isinstance(value, bool)
    require(fits, f"{value!r} is not a {kind.__name__}")
    return value

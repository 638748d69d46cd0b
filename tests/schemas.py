"""Random JSON schemas, each with what holds of the texts that fit it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Fits = Callable[[Any], bool]
Made = tuple[dict[str, Any], Fits]
WORDS = ("on", "off", "colour", "Straße", 'a"b', "x y")


def random_schema(rng: random.Random, depth: int = 2) -> Made:
    """A schema of bounded texts, nested `depth` deep at most."""
    kinds = [_integer, _string, _choice, _plain]
    if depth:
        kinds += [_array, _object, _either]
    return rng.choice(kinds)(rng, depth)


def random_object(rng: random.Random) -> Made:
    """A schema whose texts are objects."""
    return _object(rng, 2)


def _integer(rng: random.Random, _depth: int) -> Made:
    low = rng.randint(-2000, 100)
    high = low + rng.randint(0, 3000)
    return {"type": "integer", "minimum": low, "maximum": high}, (
        lambda value: type(value) is int and low <= value <= high
    )


def _string(rng: random.Random, _depth: int) -> Made:
    low = rng.randint(0, 2)
    high = low + rng.randint(0, 6)
    if rng.random() < 0.5:
        return {"type": "string", "pattern": f"^[a-f]{{{low},{high}}}-[0-9]$"}, (
            lambda value: (
                isinstance(value, str)
                and value[-2:-1] == "-"
                and value[-1:] in set("0123456789")
                and low <= len(value) - 2 <= high
                and set(value[:-2]) <= set("abcdef")
            )
        )
    return {"type": "string", "minLength": low, "maxLength": high}, (
        lambda value: isinstance(value, str) and low <= len(value) <= high
    )


def _choice(rng: random.Random, _depth: int) -> Made:
    values = rng.sample((*WORDS, 7, -1, True, None), rng.randint(1, 4))
    return {"enum": values}, lambda value: any(type(value) is type(one) and value == one for one in values)


def _plain(rng: random.Random, _depth: int) -> Made:
    if rng.random() < 0.5:
        return {"type": "boolean"}, lambda value: type(value) is bool
    return {"type": "null"}, lambda value: value is None


def _array(rng: random.Random, depth: int) -> Made:
    inner, fits = random_schema(rng, depth - 1)
    low = rng.randint(0, 2)
    high = low + rng.randint(0, 2)
    return {"type": "array", "items": inner, "minItems": low, "maxItems": high}, (
        lambda value: isinstance(value, list) and low <= len(value) <= high and all(map(fits, value))
    )


def _object(rng: random.Random, depth: int) -> Made:
    parts = {name: random_schema(rng, depth - 1) for name in rng.sample(WORDS, rng.randint(1, 4))}
    required = rng.sample(list(parts), rng.randint(0, len(parts)))
    schema = {
        "type": "object",
        "properties": {name: inner for name, (inner, _) in parts.items()},
        "required": required,
        "additionalProperties": False,
    }

    def fits(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and set(required) <= value.keys() <= parts.keys()
            and all(parts[name][1](one) for name, one in value.items())
        )

    return schema, fits


def _either(rng: random.Random, depth: int) -> Made:
    (one, fits_one), (other, fits_other) = random_schema(rng, depth - 1), random_schema(rng, depth - 1)
    return {"anyOf": [one, other]}, lambda value: fits_one(value) or fits_other(value)

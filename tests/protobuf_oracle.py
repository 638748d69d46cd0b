"""What protobuf's own runtime makes of a published definition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_KINDS = {"bytes": 12, "int32": 5, "bool": 8, "uint": 13}


def oracle(package: str, declared: Mapping[str, Mapping[str, tuple[int, str]]], wanted: str = "Message") -> Any:
    """A message class. `declared`: by message, the number and kind of each field; "*" before a kind: repeated."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    for name, fields in declared.items():
        made = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            single = kind.removeprefix("*")
            label = 3 if kind.startswith("*") else 1
            added = made.field.add(name=field, number=number, label=label, type=_KINDS.get(single, 11))
            if single not in _KINDS:
                added.type_name = f".{package}.{single}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{wanted}"))

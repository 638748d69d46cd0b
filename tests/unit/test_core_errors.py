"""The tree drawn in core/errors.py is the tree of the classes."""

from __future__ import annotations

import re

from meshnode.core import errors
from protocols.errors import LocalProtocolError, MeshError, ProtocolError, RemoteProtocolError


def drawn() -> set[tuple[str, str]]:
    """(class, parent) pairs of the drawing in the module's docstring."""
    stack: list[str] = []
    pairs: set[tuple[str, str]] = set()
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([│├└─\s]*)([A-Z][A-Za-z]+)(\s{2,}|$)", line)
        if match:
            depth = len(match[1]) // 4
            del stack[depth:]
            if stack:
                pairs.add((match[2], stack[-1]))
            stack.append(match[2])
    return pairs


def defined() -> set[tuple[str, str]]:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, MeshError)]
    return {(c.__name__, c.__bases__[0].__name__) for c in (*classes, ProtocolError) if c is not MeshError}


def test_the_drawing_equals_the_classes() -> None:
    assert drawn() == defined()
    assert {LocalProtocolError.__base__, RemoteProtocolError.__base__} == {ProtocolError}


def test_fatal_errors_end_with_different_exit_codes() -> None:
    codes = [c.exit_code for c in (errors.FatalError, *errors.FatalError.__subclasses__())]
    assert 0 not in codes
    assert len(set(codes)) == len(codes)

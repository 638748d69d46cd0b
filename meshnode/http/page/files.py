"""The web page's files, as the node gives them: no build step, nothing from another host, no script in the markup."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from meshnode.http.problems import Problem

INDEX: Final = "index.html"
TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# A page that shows what models say must not run it, whatever its own code does wrong.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "cache-control": "no-cache",  # asked for again, and answered with 304: an updated node shows its own page at once
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One of them. `tag`: changes with its bytes (RFC 9110, section 8.8.3)."""

    data: bytes
    media_type: str
    tag: str


class Page:
    """All of them, in memory: some 60 kB."""

    def __init__(self, files: Mapping[str, PageFile]) -> None:
        self._files = files

    def give(self, name: str, request: Request) -> Response:
        """The file of that name, or 304 for who has it already. Raises Problem 404."""
        file = self._files.get(name)
        if file is None:
            raise Problem(404, "not_found", f"the page has no file {name[:80]}")
        headers = {**HEADERS, "etag": file.tag}
        if request.headers.get("if-none-match") == file.tag:
            return Response(status_code=304, headers=headers)
        return Response(file.data, headers={**headers, "content-type": file.media_type})


def read_page() -> Page:
    """The page as it is installed."""
    folder = resources.files(__package__).joinpath("static")
    files = {}
    for entry in folder.iterdir():
        data = entry.read_bytes()
        tag = f'"{hashlib.sha256(data).hexdigest()[:20]}"'
        files[entry.name] = PageFile(data, TYPES[entry.name.rpartition(".")[2]], tag)
    return Page(files)


def wants_page(request: Request) -> bool:
    """Whether a person's browser asks, and no program: those look at `/` to see whether somebody is there."""
    return "text/html" in request.headers.get("accept", "")

"""The web page's files: what the node gives, and what must not be in them. tests/process/test_page.py opens it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
from starlette.requests import Request

from meshnode.http.page.files import HEADERS, INDEX, POLICY, Page, read_page, wants_page
from meshnode.http.problems import Problem

STATIC = Path(str(resources.files("meshnode.http.page").joinpath("static")))
FILES = sorted(STATIC.iterdir())
TEXT = {file.name: file.read_text() for file in FILES}


@pytest.fixture(scope="module")
def page() -> Page:
    return read_page()


def asking(**headers: str) -> Request:
    """A GET with these headers."""
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "GET", "path": "/", "headers": pairs})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_is_given_as_it_is_with_a_policy(page: Page, file: Path) -> None:
    response = page.give(file.name, asking())
    assert response.status_code == 200
    assert response.body == file.read_bytes()
    assert {name: response.headers[name] for name in HEADERS} == HEADERS
    again = page.give(file.name, asking(if_none_match=response.headers["etag"]))
    assert (again.status_code, again.body) == (304, b"")
    assert page.give(file.name, asking(if_none_match='"older"')).status_code == 200


@pytest.mark.parametrize("name", ["", "files.py", "../files.py", "..", "index.html/", "no\x00thing"])
def test_there_is_nothing_else(page: Page, name: str) -> None:
    with pytest.raises(Problem, match="no file") as refused:
        page.give(name, asking())
    assert refused.value.status == 404


def test_the_policy_lets_in_no_other_host_and_no_inline_code() -> None:
    rules = dict(rule.strip().split(" ", 1) for rule in POLICY.split(";"))
    assert set(rules.values()) == {"'none'", "'self'"}
    assert rules["default-src"] == "'none'"


def test_a_browser_gets_the_page_and_a_program_a_line() -> None:
    assert wants_page(asking(accept="text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"))
    assert not wants_page(asking(accept="*/*"))
    assert not wants_page(asking())


@pytest.mark.parametrize("name", TEXT)
def test_nothing_comes_from_another_host(name: str) -> None:
    """Names of XML's namespaces are no addresses; a regular expression has no host behind its slashes."""
    found = set(re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]+[^\s\"']*", TEXT[name]))
    assert found <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("name", [name for name in TEXT if name.endswith(".js")])
def test_scripts_make_elements_and_no_markup(name: str) -> None:
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "eval(", "Function("):
        assert way not in TEXT[name]
    for wanted in re.findall(r'from "([^"]+)"', TEXT[name]):
        folder, _, file = wanted.rpartition("/")
        assert folder == "/page"
        assert file in TEXT


def test_every_script_is_used() -> None:
    used = {"main.js"} | {name for text in TEXT.values() for name in re.findall(r'from "/page/([^"]+)"', text)}
    assert used == {name for name in TEXT if name.endswith(".js")}


def test_the_markup_has_no_inline_code_and_every_id_that_scripts_look_for() -> None:
    ids, wrong = set[str](), []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = dict(attrs)
            ids.add(given.get("id") or "")
            if tag == "style" or (tag == "script" and not given.get("src")):
                wrong.append(tag)
            wrong.extend(name for name in given if name == "style" or name.startswith("on"))

    Reader().feed(TEXT[INDEX])
    assert wrong == []
    asked = {id for text in TEXT.values() for id in re.findall(r'byId\("([^"]+)"\)', text)}
    assert asked
    assert asked <= ids

"""The web page in a real browser, with a node behind it that says what a test wants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import trio

from meshnode.core.errors import PeerUnreachable
from meshnode.state.api_keys import make_key
from tests.page_rig import ADAPTER, STATUS, Node, browser, needs_chromium, node, playwright, window

pytestmark = [pytest.mark.slow, pytest.mark.net, needs_chromium]

expect = playwright.expect


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture
def home() -> Iterator[Node]:
    with node() as started:
        yield started


def ask(page: Any, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


def test_the_mesh_is_shown_and_changes(chromium: Any, home: Node) -> None:
    with window(chromium, home.url) as opened:
        page = opened.page
        cards = page.locator("#nodes .card")
        expect(cards).to_have_count(3)
        for index, (name, layers) in enumerate((("kitchen", "0–7"), ("laptop", "8–15"), ("tablet", "16–23"))):
            expect(cards.nth(index)).to_contain_text(name)
            expect(cards.nth(index)).to_contain_text(f"serves layers {layers}")
        expect(cards.nth(2)).to_contain_text("round trip 40 ms")
        expect(page.locator("#map .name")).to_have_text(["kitchen", "laptop", "tablet"])
        expect(page.locator("#readiness")).to_have_text(f"Ready: {STATUS.readiness}")
        expect(page.locator("#copies .cells span")).to_have_count(2)
        expect(page.locator("#copies .thin")).to_have_attribute("title", "layer.1: 1 copy")
        expect(page.locator("#health li")).to_have_text(f"medium: {STATUS.health[0].text}")
        page.click("nav a[data-view=learning]")
        expect(page.locator("#learning figcaption")).to_have_text("Loss over the last 3 steps: from 2.000 to 1.200")
        expect(page.locator("#releases .card")).to_contain_text("answers here")
        page.click("nav a[data-view=mesh]")

        laptop, tablet = STATUS.peers
        home.tell(peers=(laptop,), ready=False, readiness="nobody serves layers 16-23", health=())
        lost = page.locator('#nodes [data-peer="12D3KooWtablet"]')
        expect(lost).to_have_attribute("data-state", "lost", timeout=5000)
        expect(lost).to_contain_text("lost: nothing was heard of it")
        expect(page.locator("#readiness")).to_have_text("Not ready: nobody serves layers 16-23")
        expect(page.locator("#health li")).to_have_text("Nothing is wrong.")
        home.tell(peers=(replace(laptop, connected=False, age_s=2.0), tablet), ready=True)
        expect(page.locator('#nodes [data-state="lost"]')).to_contain_text("the connection has ended")
        home.tell(peers=(laptop, replace(tablet, state="draining")))
        expect(lost).to_contain_text("is leaving")
        home.tell(peers=(laptop,))
        expect(lost).to_contain_text("has left")


def test_an_answer_is_streamed_judged_and_asked_again(chromium: Any, home: Node) -> None:
    home.do(lambda door: setattr(door, "hold", trio.Event()))
    with window(chromium, home.url) as opened:
        page = opened.page
        page.select_option("#adapter", ADAPTER)
        ask(page, "hello")
        answers = page.locator("#turns article.assistant")
        expect(answers.locator(".body")).to_have_text("Hello")
        assert home.do(lambda door: door.asked[0].adapter) == ADAPTER
        expect(page.locator("#send")).to_be_hidden()
        home.do(lambda door: door.hold.set())  # type: ignore[union-attr]
        expect(answers.locator(".body strong")).to_have_text("you")
        expect(answers.locator(".foot")).to_contain_text("50.0 tokens a second")
        expect(page.locator("#answers tbody tr")).to_contain_text(["0.1 ms way, 0.2 ms wait, 3.0 ms work"])

        answers.get_by_role("button", name="Wrong").click()
        answers.get_by_label("The right answer").fill("goodbye")
        answers.get_by_role("button", name="Send").click()
        expect(answers.locator(".foot")).to_contain_text("Noted: wrong.")
        answers.get_by_role("button", name="Right").click()
        expect(answers.locator(".foot")).to_contain_text("Noted: right.")
        assert home.do(lambda door: door.judged) == [("7", False, "goodbye"), ("7", True, "")]

        answers.get_by_role("button", name="Again").click()
        expect(answers).to_have_count(1)
        expect(answers.locator(".foot")).to_contain_text("50.0 tokens a second")
        ask(page, "and now?")
        expect(answers).to_have_count(2)
        expect(answers.nth(1).locator(".foot")).to_contain_text("50.0")
        asked = home.do(lambda door: [[turn["content"] for turn in one.messages or ()] for one in door.asked])
        assert asked == [["hello"], ["hello"], ["hello", "Hello **you**", "and now?"]]

        page.locator("#turns article.user").first.get_by_role("button", name="Edit").click()
        page.get_by_label("Your question, changed").fill("good evening")
        page.get_by_role("button", name="Ask again").click()
        expect(page.locator("#turns article.user .body")).to_have_text(["good evening"])
        expect(answers.locator(".foot")).to_contain_text("50.0")
        assert home.do(lambda door: [turn["content"] for turn in door.asked[-1].messages or ()]) == ["good evening"]
        page.click("#new-chat")
        expect(page.locator("#turns article")).to_have_count(0)


def test_an_answer_is_stopped_and_breaks_off_in_words(chromium: Any, home: Node) -> None:
    home.do(lambda door: setattr(door, "hold", trio.Event()))
    with window(chromium, home.url) as opened:
        page = opened.page
        ask(page, "hello")
        expect(page.locator("article.assistant .body")).to_have_text("Hello")
        page.press("#question", "Escape")
        expect(page.locator("article.assistant .foot")).to_contain_text("Stopped.")
        with_trio = home.do(lambda door: door.ended)
        page.wait_for_timeout(0)
        for _ in range(50):
            if with_trio.is_set():
                break
            page.wait_for_timeout(100)
        assert with_trio.is_set()

        def fails(door: Any) -> None:
            door.hold, door.error, door.error_after = None, PeerUnreachable("PEER went away"), 1

        home.do(fails)
        page.press("body", "/")
        page.keyboard.type("again")
        page.keyboard.press("Enter")
        last = page.locator("article.assistant").nth(1)
        expect(last.locator(".foot")).to_contain_text("laptop (PEER) went away")
        expect(last.locator(".body")).to_have_text("Hello")


FOREIGN = """# A title
<img src=x onerror="document.title='taken'"><script>document.title='taken'</script>

![picture](https://elsewhere.example/x.png) [bad](javascript:alert(1)) [good](https://example.org/a) snake_case_name

- one **bold *both***
- two `code <b>`
  1. inner

| a | b |
|---|--:|
| 1 | 2 |

```python
print("<hi>")
```
> quoted
"""


def test_foreign_text_stays_text(chromium: Any, home: Node) -> None:
    home.do(lambda door: setattr(door, "words", [FOREIGN]))
    with window(chromium, home.url) as opened:
        page = opened.page
        ask(page, "hello")
        body = page.locator("article.assistant .body")
        expect(body.locator("blockquote")).to_have_text("quoted")
        assert page.title() == "meshnode"
        assert body.locator("img, script").count() == 0
        links = body.locator("a").evaluate_all("all => all.map(a => [a.textContent, a.href, a.rel])")
        assert [(text, href) for text, href, _ in links] == [
            ("picture", "https://elsewhere.example/x.png"),
            ("good", "https://example.org/a"),
        ]
        assert all("noopener" in rel for _, _, rel in links)
        expect(body.locator("h3")).to_have_text("A title")
        expect(body).to_contain_text("[bad](javascript:alert(1))")
        expect(body).to_contain_text("snake_case_name")
        expect(body.locator("li li")).to_have_text("inner")
        expect(body.locator("li strong em")).to_have_text("both")
        expect(body.locator("td")).to_have_text(["1", "2"])
        expect(body.locator("pre")).to_have_text('print("<hi>")')
        spent = page.evaluate(
            """async () => {
              const { markdown } = await import("/page/markdown.js");
              const began = performance.now();
              for (const part of ["[", "*", "**a ", "`", "_a", "![", "> ", "- ", "|-", "```\\n", "[a](", "1."]) {
                markdown(part.repeat(20000));
              }
              return performance.now() - began;
            }"""
        )
        assert spent < 20_000, spent  # a model that says nonsense must not hang the page


def test_a_key_is_asked_for(chromium: Any) -> None:
    with node(keyed=True) as home:
        _, text = home.do(lambda _: make_key(home.served.state, "page", scopes=("admin",), now_ms=1))
        context = chromium.new_context()
        page = context.new_page()
        page.goto(home.url)
        expect(page.locator("#key-why")).to_contain_text("this node asks for a key")
        page.fill("#key", text)
        page.press("#key", "Enter")
        expect(page.locator("#nodes .card")).to_have_count(3)
        ask(page, "hello")
        expect(page.locator("article.assistant .body strong")).to_have_text("you")
        context.close()


def test_a_node_that_stops_is_said_to_and_found_again(chromium: Any) -> None:
    with node() as home:
        context = chromium.new_context()
        page = context.new_page()
        page.goto(home.url)
        expect(page.locator("#readiness")).to_contain_text("Ready")
    expect(page.locator("#readiness")).to_contain_text("Trying again", timeout=5000)
    expect(page.locator("#readiness")).to_have_attribute("data-tone", "bad")
    context.close()


LOOKS = {
    "desktop": {"viewport": {"width": 1280, "height": 860}},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
    "dark": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"},
}


@pytest.mark.parametrize("look", LOOKS)
def test_everybody_can_use_it(chromium: Any, home: Node, look: str) -> None:
    """No serious violation of the Web Content Accessibility Guidelines, as far as axe finds them."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe: pip install '.[dev]'").Axe()
    with window(chromium, home.url, **LOOKS[look]) as opened:
        page = opened.page
        ask(page, "hello")
        expect(page.locator("article.assistant .foot")).to_contain_text("50.0")
        for view in ("chat", "mesh", "learning"):
            page.click(f"nav a[data-view={view}]")
            expect(page.locator(f"#view-{view}")).to_be_visible()
            found = axe.run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]})
            serious = [
                (one["id"], one["help"], [part["html"][:100] for part in one["nodes"]])
                for one in found.response["violations"]
                if one["impact"] in ("serious", "critical")
            ]
            assert serious == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"

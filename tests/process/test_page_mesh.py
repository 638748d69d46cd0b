"""The web page of a real node: three processes, a real browser."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.page_rig import browser, needs_chromium, playwright, window
from tests.process.mesh_rig import mesh_of, serving, small_model

pytestmark = [pytest.mark.slow, pytest.mark.net, pytest.mark.process, needs_chromium]

expect = playwright.expect
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
ANSWER_MS = 60_000  # generous: the machine may be busy with other things
LOST_MS = 5_000


def test_the_page_shows_three_nodes_asks_them_and_sees_one_die(tmp_path: Path) -> None:
    published = small_model(tmp_path / "model", template=TEMPLATE)
    with (
        mesh_of(tmp_path, 3, published=published, settings=(("serve.layers", 8),)) as mesh,
        browser() as chromium,
    ):
        asked, victim = mesh.members[0], mesh.members[2]
        with window(chromium, asked.api_url, viewport={"width": 1280, "height": 860}) as opened:
            page = opened.page
            held = serving(asked.status())
            assert len(held) == 3
            for peer, (first, last) in held.items():
                card = page.locator(f'#nodes [data-peer="{peer}"]')
                expect(card).to_contain_text(f"serves layers {first}–{last - 1}", timeout=ANSWER_MS)

            page.click("#view-chat summary")
            page.fill("#max-tokens", "12")
            page.fill("#temperature", "0")
            page.fill("#question", "w5 w6 w7")
            page.press("#question", "Enter")
            answer = page.locator("article.assistant")
            expect(answer.get_by_role("button", name="Right")).to_be_visible(timeout=ANSWER_MS)
            assert len(answer.locator(".body").inner_text().split()) == 12
            expect(page.locator("#answers tbody tr")).to_have_count(3)
            answer.get_by_role("button", name="Wrong").click()
            answer.get_by_label("The right answer").fill("w9")
            answer.get_by_role("button", name="Send").click()
            expect(answer).to_contain_text("Noted: wrong.", timeout=ANSWER_MS)
            samples = asked.status().samples
            assert (samples.judged, samples.judged_wrong, samples.labelled) == (1, 1, 1)

            victim.signal(signal.SIGKILL)
            lost = page.locator(f'#nodes [data-peer="{victim.peer_id}"]')
            expect(lost).to_have_attribute("data-state", "lost", timeout=LOST_MS)
            expect(page.locator("#map .gone .name")).to_have_count(1)

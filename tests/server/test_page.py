"""The page in a real browser that reaches nothing but the server."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator

import pytest

from alignez_gguf import demo
from alignez_gguf.demo import eval_queries
from alignez_gguf.prompts.templates import Templates
from tests.server.client import Server, until
from tests.server.conftest import Lone, Serve

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

TEMPLATES = Templates.from_file(demo.TEMPLATES)
FIRST, SECOND = (row.query for row in eval_queries()[:2])


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: playwright.Browser, server: Server) -> Iterator[playwright.Page]:
    """The page of the shared server; at the end nothing may have been complained of or fetched elsewhere."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(20_000)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith(server.url) or complaints.append(request.url))
    page.goto(server.url)
    playwright.expect(page.locator("#model")).to_have_text("demo, steered by safe")
    yield page
    context.close()
    assert complaints == []


def send(page: playwright.Page, message: str, strength: str = "1") -> None:
    """Ask with settings under which the engine gives the same answer, and wait for it."""
    page.evaluate("document.querySelector('details').open = true")
    page.fill("#temperature", "0")
    page.fill("#max-tokens", "12")
    page.locator("#strength").fill(strength)
    page.fill("#message", message)
    page.press("#message", "Enter")
    playwright.expect(page.locator("#send")).to_be_enabled()
    playwright.expect(page.locator("#error")).to_be_empty()


def answers(page: playwright.Page, column: str) -> list[str]:
    return [text.strip() for text in page.locator(f"#{column} .answer").all_text_contents()]


def test_both_columns_answer_and_the_conversation_goes_on_from_the_steered_one(
    page: playwright.Page, lone: Lone
) -> None:
    def expected(prompt: str, strength: float) -> str:
        return lone(prompt, 0, strength, temperature=0, stop=TEMPLATES.stop).strip()

    send(page, FIRST)
    prompt = TEMPLATES.plain_prompt(FIRST)
    first = expected(prompt, 1.0)
    assert (answers(page, "base"), answers(page, "steered")) == ([expected(prompt, 0.0)], [first])

    send(page, SECOND, "0.5")
    prompt = TEMPLATES.conversation([(FIRST, first)], SECOND)
    assert answers(page, "base")[1:] == [expected(prompt, 0.0)]
    assert answers(page, "steered")[1:] == [expected(prompt, 0.5)]

    page.click("#clear")
    assert answers(page, "base") == answers(page, "steered") == []


def test_slider_says_its_value_and_moves_with_the_keyboard(page: playwright.Page) -> None:
    page.focus("#strength")
    page.keyboard.press("ArrowRight")
    playwright.expect(page.locator("#strength-value")).to_have_text("1.05")
    page.keyboard.press("Home")
    playwright.expect(page.locator("#strength-value")).to_have_text("0.00")


def test_strength_zero_tints_nothing_and_equals_the_base_column(page: playwright.Page) -> None:
    send(page, FIRST, "0")
    assert answers(page, "base") == answers(page, "steered") != []
    tints = page.eval_on_selector_all(
        "#steered .token", "all => all.map(one => one.style.getPropertyValue('--kl'))"
    )
    assert set(tints) == {"0"}


def test_tokens_that_steering_moved_are_tinted(page: playwright.Page) -> None:
    send(page, FIRST)
    tokens = page.locator("#steered .token")
    assert "".join(tokens.all_text_contents()).strip() == answers(page, "steered")[0]
    assert re.fullmatch(r"KL \d+\.\d{3} nat", tokens.first.get_attribute("title") or "")
    colour = "all => getComputedStyle(all[0]).backgroundColor"
    assert page.eval_on_selector_all("#steered .token", colour) != "rgba(0, 0, 0, 0)"
    page.uncheck("#tint")
    assert page.eval_on_selector_all("#steered .token", colour) == "rgba(0, 0, 0, 0)"


def test_chart_and_table_show_every_layer(page: playwright.Page, server: Server) -> None:
    n_layer = server.service.model.info.n_layer
    kinds = page.eval_on_selector_all("#chart rect", "all => all.map(one => one.getAttribute('class'))")
    assert kinds == ["none", "remove", "add", *["none"] * (n_layer - 3)]
    assert page.locator("#profile-table tbody tr").count() == n_layer
    page.evaluate("document.querySelector('details').open = true")
    page.select_option("#control", "other")
    assert page.locator("#chart rect").count() == n_layer


def test_stop_ends_both_answers_on_the_server(
    page: playwright.Page, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = server.service.scheduler
    batch = scheduler._batch
    decode = batch._decode
    released = threading.Event()
    monkeypatch.setattr(batch, "_decode", lambda: (released.wait(20), decode()))
    page.evaluate("document.querySelector('details').open = true")
    page.fill("#max-tokens", "200")
    page.fill("#temperature", "2")
    page.fill("#message", FIRST)
    page.click("#send")
    until(lambda: scheduler.n_running + scheduler.n_waiting == 2)
    page.click("#stop")
    playwright.expect(page.locator("#send")).to_be_enabled()
    playwright.expect(page.locator("#error")).to_be_empty()
    released.set()
    until(lambda: not scheduler.n_running and not scheduler.n_waiting)
    assert page.locator("#message").evaluate("one => one === document.activeElement")


def test_every_control_has_a_name_and_is_reached_by_keyboard(page: playwright.Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    unnamed = page.eval_on_selector_all(
        "input, textarea, select, button",
        "all => all.filter(one => !(one.labels?.length || one.textContent.trim())).map(one => one.id)",
    )
    assert unnamed == []
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {
        "message",
        "strength",
        "control",
        "scope",
        "temperature",
        "key",
        "send",
        "clear",
        "base",
        "steered",
    } <= reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_in_dark(
    browser: playwright.Browser, server: Server, scheme: str
) -> None:
    context = browser.new_context(color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(server.url)
    pairs = page.evaluate(
        """() => [["body", "body"], ["#model", "body"], [".log", ".log"], ["#send", "#send"]].map(
            ([ink, paper]) => [getComputedStyle(document.querySelector(ink)).color,
                               getComputedStyle(document.querySelector(paper)).backgroundColor])"""
    )
    context.close()
    for ink, paper in pairs:
        assert contrast(ink, paper) >= 4.5  # WCAG 2.2, 1.4.3


def contrast(one: str, other: str) -> float:
    """The contrast of two colours as WCAG 2.2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_narrow_screen_needs_no_sideways_scrolling(browser: playwright.Browser, server: Server) -> None:
    context = browser.new_context(viewport={"width": 320, "height": 640})
    page = context.new_page()
    page.goto(server.url)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    context.close()


def test_key_is_asked_for_and_kept_by_the_page(browser: playwright.Browser, serve: Serve) -> None:
    with serve(api_keys=("secret",)) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        playwright.expect(page.locator("#error")).to_contain_text("API key")
        page.evaluate("document.querySelector('details').open = true")
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        playwright.expect(page.locator("#model")).to_have_text("demo, steered by safe")
        playwright.expect(page.locator("#error")).to_be_empty()
        context.close()

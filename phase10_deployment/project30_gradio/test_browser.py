"""The page in a browser: a message sent and stopped, every panel opened, a phone, a server that is down."""

import os
import re
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip(
    "playwright.sync_api", reason='needs Playwright: add "playwright>=1.50" to a dependency group, or `uv run --with`'
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 800}
PANELS = {
    "Tokens": ("tokens", r"tokens"), "Next token": ("next", r"bits of surprise"),
    "Attention": ("attention", r"on the first token"), "KV blocks": ("blocks", r"saved by sharing"),
    "Prefix cache": ("prefix", r"tokens found"), "Speculation": ("speculation", r"runs of the model"),
}  # fmt: skip
SECONDS = 60_000  # patience of a machine with much to do, in milliseconds


@pytest.fixture(scope="module")
def browser():
    """A browser without a window."""
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = next(filter(None, map(shutil.which, NAMES)), own if os.path.exists(own) else None)
        if path is None:
            pytest.skip("needs a browser: `apt-get install chromium`, or `playwright install chromium`")
        with playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]) as browser:
            yield browser


@pytest.fixture(scope="module")
def house(open_page):
    """A page whose model takes its time."""
    with open_page(slow=True) as page:
        yield page


@pytest.fixture
def tab(browser, house):
    """`tab(viewport)`: the page, opened; asserts that it asked nobody else, and that no script failed."""
    opened, strangers, errors = [], [], []

    def open_tab(viewport=DESK):
        tab = browser.new_page(viewport=viewport)
        tab.set_default_timeout(SECONDS)
        tab.on(
            "request", lambda r: None if r.url.startswith((house.url, "data:", "blob:")) else strangers.append(r.url)
        )
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(house.url)
        sync_api.expect(tab.locator("#status")).to_contain_text("parameters", timeout=SECONDS)
        opened.append(tab)
        return tab

    yield open_tab
    for each in opened:
        each.close()
    assert not strangers and not errors


def say(tab, words):
    tab.locator("#message textarea").fill(words)
    tab.keyboard.press("Enter")


def open_panel(tab, name):
    """Open a panel, also where its tab has gone into the menu of what does not fit."""
    if tab.get_by_role("tab", name="Playground").get_attribute("aria-selected") != "true":
        tab.get_by_role("tab", name="Playground").click()
    title = tab.get_by_role("tab", name=name, exact=True)
    if title.first.is_visible():
        title.first.click()
    else:
        tab.locator("#panels .overflow-menu > button").first.click()
        tab.locator("#panels .overflow-dropdown button", has_text=name).click()


def test_a_message_is_answered_and_another_stopped(tab, house, tmp_path, eventually):
    page = tab()
    page.get_by_label("number input for Max tokens").fill("12")
    page.keyboard.press("Tab")
    say(page, "Hello")
    sync_api.expect(page.locator("#told")).to_contain_text("12 tokens in", timeout=SECONDS)
    assert page.locator("#chatbot .message.bot").count() == 1
    page.get_by_label("number input for Max tokens").fill("200")
    page.keyboard.press("Tab")
    say(page, "And now a long one")
    page.locator("#message").get_by_text("Stop").click()
    sync_api.expect(page.locator("#told")).to_contain_text("stopped", timeout=SECONDS)
    sync_api.expect(page.locator("#message").get_by_text("Send")).to_be_visible()
    eventually(lambda: house.client.gauges.running == 0 and house.client.n_open == 0)
    assert house.client.gauges.usage == 0.0
    page.screenshot(path=tmp_path / "chat.png")
    assert (tmp_path / "chat.png").stat().st_size > 10_000


def test_closing_the_tab_frees_the_place(tab, house, eventually):
    page = tab()
    say(page, "A long one for nobody")
    eventually(lambda: house.client.gauges.running == 1)
    page.goto("about:blank")
    eventually(lambda: house.client.gauges.running == 0 and house.client.n_open == 0)


def test_a_conversation_survives_a_new_one_and_a_reload(tab):
    page = tab()
    page.get_by_label("number input for Max tokens").fill("4")
    page.keyboard.press("Tab")
    say(page, "Keep this")
    sync_api.expect(page.locator("#told")).to_contain_text("tokens in", timeout=SECONDS)
    page.get_by_role("button", name="New").click()
    sync_api.expect(page.locator("#chatbot .message.user")).to_have_count(0)
    page.reload()
    page.get_by_text("Earlier conversations").click()
    page.locator("#earlier").get_by_text("Keep this").click()
    sync_api.expect(page.locator("#chatbot .message.user")).to_contain_text("Keep this")
    page.get_by_role("button", name="Undo").click()
    sync_api.expect(page.locator("#message textarea")).to_have_value("Keep this")


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_every_panel_opens_and_shows_something(tab, tmp_path, viewport):
    page = tab(viewport)
    for name, (prefix, words) in PANELS.items():
        open_panel(page, name)
        page.locator(f"#{prefix}-run").click()
        sync_api.expect(page.locator(f"#{prefix}-picture")).to_contain_text(re.compile(words), timeout=SECONDS)
        picture: Path = tmp_path / f"{prefix}.png"
        page.screenshot(path=picture)
        assert picture.stat().st_size > 10_000
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= viewport["width"], f"{name} is {width} pixels wide"


def test_the_sliders_of_the_next_token_change_the_picture(tab):
    page = tab()
    open_panel(page, "Next token")
    page.locator("#next-run").click()
    picture = page.locator("#next-picture")
    sync_api.expect(picture).to_contain_text("bits of surprise", timeout=SECONDS)
    page.get_by_label("number input for Temperature").last.fill("0")
    page.keyboard.press("Tab")
    sync_api.expect(picture).to_contain_text("→ 0.00", timeout=SECONDS)
    assert picture.locator(".pg-out").count() > 5


def test_the_film_of_the_blocks_can_be_looked_at_again(tab):
    page = tab()
    open_panel(page, "KV blocks")
    page.locator("#blocks-run").click()
    moment = page.locator("#moment input[type=range]")
    moment.wait_for(timeout=SECONDS)
    sync_api.expect(page.locator("#blocks-picture .pg-table")).to_have_count(5)  # the fullest moment
    moment.fill("0")
    sync_api.expect(page.locator("#blocks-picture .pg-table")).to_have_count(0)


def test_a_page_says_when_its_server_goes(browser, open_page):
    with open_page() as page:
        tab = browser.new_page(viewport=PHONE)
        tab.goto(page.url)
        status = tab.locator("#status")
        sync_api.expect(status).to_contain_text("parameters", timeout=SECONDS)
        page.client._lost("a test broke it")  # the page lives on, as its engine is another process
        page.client._set("broken", "a test broke it")
        sync_api.expect(status).to_contain_text("its terminal says why", timeout=SECONDS)
        tab.close()


def test_a_server_that_is_down_is_told_at_the_width_of_a_phone_and_the_question_comes_back(browser, lonely_page):
    page = browser.new_page(viewport=PHONE)
    page.goto(lonely_page)
    sync_api.expect(page.locator("#status")).to_contain_text("no server answers", timeout=SECONDS)
    say(page, "Is anybody there?")
    sync_api.expect(page.locator("#told")).to_contain_text("no server answers", timeout=SECONDS)
    sync_api.expect(page.locator("#message textarea")).to_have_value("Is anybody there?")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.close()


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

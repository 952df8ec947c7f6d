"""The web page in headless Chromium: chat with streaming, stop, regenerate; the picture of the
placement; keyboard and names for screen readers. Needs playwright and a Chromium.

    pip install playwright && apt-get install chromium
    pytest -m browser tests/needs/test_page.py
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser
FAKE = Path(__file__).parents[1] / "server" / "serve_fake.py"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    command = [sys.executable, str(FAKE), "-", "0.03"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.set_default_timeout(10_000)
    page.asked, page.complaints = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda m: page.complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#model option[value=fake]", state="attached")
    yield page
    assert page.complaints == []
    assert all(asked.startswith(url) for asked in page.asked)  # nothing from elsewhere
    page.close()


def answer(page: Any) -> str:
    return str(page.locator("article.assistant .text").last.inner_text())


def complete(page: Any) -> None:
    page.wait_for_selector("#messages[aria-busy=false]")


def begun(page: Any) -> None:
    page.locator("article.assistant .text", has_text=re.compile("^012")).wait_for()


def test_answer_streams_in_and_is_counted(page: Any) -> None:
    page.keyboard.type("hello")  # the message box has the focus
    page.keyboard.press("Enter")
    page.wait_for_selector("article.assistant")
    begun(page)
    assert page.locator("#stop").is_enabled()
    assert len(answer(page)) < 30
    complete(page)
    assert answer(page) == "0123456789" * 3
    assert "31 tokens" in page.locator("article.assistant .figures").inner_text()
    assert page.locator("article.user .text").inner_text() == "hello"


def test_escape_stops_and_regenerate_writes_again(page: Any) -> None:
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    begun(page)
    page.keyboard.press("Escape")
    complete(page)
    assert 2 < len(answer(page)) < 30
    assert page.locator("#status").inner_text() == "Stopped."
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_selector("#messages[aria-busy=true]")
    complete(page)
    assert answer(page) == "0123456789" * 3
    assert page.locator("article.assistant").count() == 1


def test_sampling_settings_are_sent(page: Any) -> None:
    page.get_by_text("Sampling").click()
    page.get_by_label("Most tokens").fill("3")
    page.get_by_label("Message", exact=True).fill("hello")
    page.get_by_role("button", name="Send").click()
    page.wait_for_selector("article.assistant .figures")
    assert answer(page) == "012"
    page.get_by_label("Temperature").fill("-1")
    page.get_by_label("Message", exact=True).fill("again")
    page.get_by_role("button", name="Send").click()
    error = page.locator("article.error .text")
    error.wait_for()
    assert "temperature" in error.inner_text()
    page.complaints.clear()  # the browser notes the 400 itself


def test_placement_is_drawn_and_told(page: Any, tmp_path: Path) -> None:
    picture = page.get_by_role("img", name=re.compile("2 layers of 8 experts"))
    picture.wait_for()
    assert "16 in ram" in picture.get_attribute("aria-label")
    painted = page.evaluate(
        "() => { const c = document.querySelector('#experts');"
        "return c.getContext('2d').getImageData(2, 2, 1, 1).data[3]; }"
    )
    assert painted > 100
    assert page.locator("#memory progress").count() == 1
    page.screenshot(path=tmp_path / "page.png")


def test_everything_has_a_name(page: Any) -> None:
    nameless = page.evaluate(
        "() => [...document.querySelectorAll('button, input, select, textarea, a')].filter((e) =>"
        "!(e.innerText || e.ariaLabel || e.labels?.length)).map((e) => e.outerHTML)"
    )
    assert nameless == []
    assert page.locator("html").get_attribute("lang") == "en"


def test_the_keyboard_reaches_everything(page: Any) -> None:
    reached = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("() => document.activeElement.id || document.activeElement.tagName")
        )
    assert {"send", "model", "new", "messages", "prompt", "SUMMARY", "A"} <= reached


def test_api_page_lists_every_route(browser: Any, url: str) -> None:
    page = browser.new_page()
    page.goto(url + "/docs")
    page.get_by_text("POST /v1/chat/completions").click()
    assert page.get_by_role("cell", name="list of Message").first.is_visible()
    page.close()

"""The page as a person uses it: headless Chromium opens it, uploads, asks, moves sliders, and reads.

Left out where there is no Chromium, except in continuous integration.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoprune import tiny

from .test_upload import png_header

pytest.importorskip("gradio")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
MILLISECONDS = 120_000  # at most, for a busy machine

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="there is no chromium"
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The page's address; it is served by a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "autoprune", "demo", "--web", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        try:
            _wait(f"http://127.0.0.1:{port}/config", server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _wait(address: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).read()
            return
        except OSError:
            time.sleep(0.5)
    server.kill()
    pytest.fail(f"the page did not come up: {server.communicate()[0].decode()}")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield opened
        opened.close()


class Person:
    """Somebody at the page, in a browser window of their own."""

    def __init__(self, browser, address: str) -> None:
        self.page = browser.new_context(viewport={"width": 1280, "height": 1400}).new_page()
        self.page.set_default_timeout(MILLISECONDS)
        self.hosts: set[str] = set()
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        # The page sends its heartbeat when its buttons work.
        with self.page.expect_request("**/heartbeat/**"):
            self.page.goto(address)
        self.page.wait_for_selector("#ask")

    def upload(self, path: Path) -> None:
        clear = self.page.locator("#picture").get_by_label("Clear")
        if clear.count():
            clear.click()
        self.page.set_input_files("#picture input[type=file]", str(path))
        self.page.wait_for_selector("#picture img", state="attached")

    def ask(self, question: str) -> None:
        self.page.fill("#question textarea", question)
        self.page.click("#ask")

    def read(self, name: str) -> str:
        """A text, as soon as there is one."""
        self.page.wait_for_function(f"document.querySelector('#{name} textarea').value != ''")
        return self.page.input_value(f"#{name} textarea")

    def message(self) -> str:
        """What the page says is wrong; it is closed then."""
        toast = self.page.locator(".toast-body.error").first
        toast.wait_for()
        text = toast.inner_text()
        toast.get_by_test_id("toast-close").click()
        toast.wait_for(state="detached")
        return text

    def source(self, name: str) -> str:
        return str(self.page.get_attribute(f"#{name} img", "src"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> list[tuple[Path, str, str]]:
    """Pictures with a question, and what the whole model answers."""
    model, processor = tiny.load()
    found = []
    for scene, question in tiny.heldout_questions(9):
        if question.kind in ("colour", "digit"):
            path = tmp_path_factory.mktemp("scenes") / "scene.png"
            scene.image.save(path)
            answer = tiny.answer(model, processor, scene.image, question.text)
            found.append((path, question.text, answer))
    assert len({answer for _, _, answer in found}) == 2
    return found


def test_a_person_asks_compares_and_talks(browser, address, scenes, tmp_path):
    picture, question, answer = scenes[0]
    person = Person(browser, address)
    page = person.page
    person.upload(picture)
    person.ask(question)
    assert person.read("full") == answer
    assert person.read("pruned")
    costs = page.inner_text("#costs")
    assert re.search(r"visual tokens, mean per layer\s+15\.81\s+144\s+89\.0%", costs)

    page.wait_for_selector("#kept img")
    before = person.source("kept")
    page.fill("#layer input[type=number]", "0")
    page.press("#layer input[type=number]", "Enter")
    page.wait_for_function(
        "before => document.querySelector('#kept img').getAttribute('src') != before", arg=before
    )
    page.screenshot(path=tmp_path / "ask.png", full_page=True)

    page.get_by_role("tab", name="Compare methods").click()
    page.click("#compare")
    page.wait_for_selector("#rows table")
    rows = [row.split("\t") for row in page.inner_text("#rows").splitlines() if "\t" in row]
    methods = ["all visual tokens", "autoprune", "divprune", "fastv", "scope"]
    assert [row[0].strip() for row in rows] == ["method", *methods]
    assert rows[1][1].strip() == answer
    page.wait_for_selector("#gallery img")
    page.screenshot(path=tmp_path / "compare.png", full_page=True)

    page.get_by_role("tab", name="Conversation").click()
    for said in (question, "what color is the ring?"):
        page.fill("#say textarea", said)
        page.click("#send")
        page.wait_for_function("document.querySelector('#say textarea').value == ''")
    page.wait_for_selector("#note :text('on the pruned cache')")
    assert "picture read and pruned" in page.inner_text("#note")
    page.screenshot(path=tmp_path / "talk.png", full_page=True)
    page.click("#anew")
    page.wait_for_function("!document.querySelector('#note table')")

    assert person.hosts == {address.removeprefix("http://")}
    for name in ("ask", "compare", "talk"):
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000


def test_what_is_no_picture_gets_a_sentence_and_the_page_lives_on(
    browser, address, scenes, tmp_path
):
    picture, question, answer = scenes[0]
    text, huge, cut = (tmp_path / name for name in ("text.png", "huge.png", "cut.jpg"))
    text.write_text("no picture at all")
    huge.write_bytes(png_header(30000, 30000))
    from PIL import Image

    Image.effect_noise((300, 300), 90).convert("RGB").save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    person = Person(browser, address)
    person.ask(question)
    assert "there is no picture yet" in person.message()
    for path, sentence in (
        (text, "not an image that can be read"),
        (huge, "too large: more than 25 million pixels"),
        (cut, "damaged or truncated"),
    ):
        person.upload(path)
        person.ask(question)
        assert sentence in person.message()
    person.upload(picture)
    person.ask("   ")
    assert "the question is empty" in person.message()
    person.page.fill("#budget input[type=number]", "1")
    person.ask(question)
    assert "smallest feasible budget" in person.message()
    person.page.fill("#budget input[type=number]", "50")
    person.ask(question)
    assert person.read("full") == answer


def test_two_people_get_their_own_answers(browser, address, scenes):
    people = [Person(browser, address) for _ in scenes]
    for person, (picture, _, _) in zip(people, scenes, strict=True):
        person.upload(picture)
    for person, (_, question, _) in zip(people, scenes, strict=True):
        person.ask(question)
    assert [person.read("full") for person in people] == [answer for _, _, answer in scenes]
    kept = []
    for person in people:
        person.page.wait_for_selector("#kept img")
        kept.append(person.source("kept"))
    assert len(set(kept)) == len(people)

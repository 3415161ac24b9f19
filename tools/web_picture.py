"""The picture of docs/web.md: the page of `autoprune demo --web`, used in headless Chromium.

python tools/web_picture.py docs/images/web.png
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import urllib.request

from playwright.sync_api import sync_playwright

PORT = 7869


def main(path: str) -> None:
    command = [sys.executable, "-m", "autoprune", "demo", "--web", "--port", str(PORT)]
    with subprocess.Popen(command) as server, sync_playwright() as playwright:
        try:
            _wait(f"http://127.0.0.1:{PORT}/config")
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": 1100, "height": 1150})
            with page.expect_request("**/heartbeat/**"):
                page.goto(f"http://127.0.0.1:{PORT}")
            page.click("#draw")
            page.wait_for_function("document.querySelector('#question textarea').value != ''")
            # The first answer loads what later ones find ready.
            for _ in range(2):
                page.click("#ask")
                page.wait_for_function("document.querySelector('#full textarea').value != ''")
                page.wait_for_selector("#curve img")
                page.wait_for_timeout(2000)
            page.screenshot(path=path, full_page=True)
        finally:
            server.terminate()


def _wait(address: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(address, timeout=5).read()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"{address} does not answer")


if __name__ == "__main__":
    main(sys.argv[1])

"""The page in a real browser without a screen; it is skipped where Chromium is not installed."""

import json
import re
import shutil
import subprocess
import urllib.request
from importlib.resources import files

import pytest
import tiny
from servers import running, until

from diffalign.serving.modes import Mode

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("prometheus_client", reason="the extra `server` is not installed")
sync = pytest.importorskip("websockets.sync.client", reason="websockets is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LARGEST = 60_000


class Browser:
    """Tab of a browser, driven over the DevTools protocol."""

    def __init__(self, address):
        self._socket = sync.connect(address, max_size=2**26)
        self._number = 0

    def call(self, method, **params):
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == self._number:
                return message["result"]

    def value(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    profile = tmp_path_factory.mktemp("profile")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-dev-shm-usage", "--remote-debugging-port=0", "--window-size=1000,900"]
    command += ["--remote-allow-origins=*", f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        port = profile / "DevToolsActivePort"
        if not until(lambda: port.is_file() and port.read_text().strip(), 60):
            process.kill()
            pytest.skip("Chromium does not start here")
        number = port.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{number}/json") as answer:
            tab = next(t for t in json.load(answer) if t["type"] == "page")
        yield Browser(tab["webSocketDebuggerUrl"])
        process.kill()


def test_the_page_is_small_and_loads_nothing_from_elsewhere():
    text = files("diffalign.serving").joinpath("page.html").read_text()
    assert len(text.encode()) < LARGEST
    assert not re.search(r"https?://|src=|@import", text)


def test_a_user_draws_compares_and_stops(browser):
    with running(tiny.sd3_model(), ui=True, max_steps=5000) as (service, url):
        # a second mode under a name of its own, so that there is something to compare
        engine = service.engine
        engine.modes = {"balanced": Mode("balanced"), **engine.modes}
        service.report = {
            **service.report,
            "modes": dict.fromkeys(engine.modes),
            "default": "balanced",
        }
        browser.call("Page.enable")
        browser.call("Page.navigate", url=url + "/")
        assert until(
            lambda: browser.value("document.querySelectorAll('#preset option').length") == 2
        )
        assert browser.value("document.getElementById('model').textContent") == "models/tiny"
        assert browser.value("document.getElementById('token').offsetParent === null")
        browser.value("document.getElementById('seed').value = '5'")
        browser.value("document.getElementById('draw').click()")
        state = "document.getElementById('state').textContent"
        assert until(lambda: browser.value(state) == "done"), browser.value(
            "document.getElementById('error').textContent"
        )
        captions = browser.value(
            "[...document.querySelectorAll('#sides figcaption')].map(c => c.textContent).join('|')"
        )
        # the two modes skip nothing, so that the images are equal
        assert re.fullmatch(
            r"balanced: [\d.]+ s; [\d.]+ times as fast, PSNR ∞ dB\|plain: [\d.]+ s", captions
        )
        width = "document.querySelector('#sides img').naturalWidth"
        assert browser.value(width) == 16
        assert browser.value("document.querySelectorAll('#gallery img').length") == 1
        browser.value("document.getElementById('size').value = '17x17'")
        browser.value("document.getElementById('draw').click()")
        error = "document.getElementById('error').textContent"
        assert until(lambda: "multiples" in (browser.value(error) or ""))


def test_the_page_asks_for_the_token(browser):
    with running(tiny.sd3_model(), ui=True, token="secret") as (_, url):
        browser.call("Page.navigate", url=url + "/")
        shown = "document.getElementById('token').offsetParent !== null"
        assert until(lambda: browser.value(shown) is True)
        browser.value(
            "document.getElementById('token').value = 'secret'; "
            "document.getElementById('token').onchange()"
        )
        model = "document.getElementById('model').textContent"
        assert until(lambda: browser.value(model) == "models/tiny")

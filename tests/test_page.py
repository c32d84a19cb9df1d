"""The server's page in a headless Chromium, driven through its DevTools pipe. Any Chromium or Chrome of the PATH, or the one
that CHROMIUM names, will do.
"""

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import replace

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
pytest.importorskip("uvicorn", reason="needs the extra [serve]")

from nanogpt.serve import api, completions
from nanogpt.serve.completions import Request
from tests.stand_ins import Bytes
from tests.test_serve import Parrot, serving, wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium: neither CHROMIUM=PATH nor one of {', '.join(NAMES)}")


class Browser:
    """One tab of a headless Chromium."""

    def __init__(self, profile):
        reading, self.commands = os.pipe()
        self.events, writing = os.pipe()
        options = ["--headless", "--no-sandbox", "--no-zygote", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        options += [f"--user-data-dir={profile}", "--disable-background-networking", "--disable-component-update"]
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (reading, writing)]
        self.process = subprocess.Popen(
            [CHROMIUM, *options, "about:blank"],
            preexec_fn=lambda: [os.dup2(fd, place) for fd, place in zip(high, (3, 4))],  # where the browser looks for them
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (reading, writing, *high):
            os.close(fd)
        self.buffer, self.number, self.session, self.complaints = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """A DevTools command's result; what the page complains of in the meantime is kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while True:
            while b"\0" not in self.buffer:
                ready, _, _ = select.select([self.events], [], [], end - time.monotonic())
                part = os.read(self.events, 65536) if ready else b""
                assert part, f"no answer to {method}; exit code {self.process.poll()}"
                self.buffer += part
            text, _, self.buffer = self.buffer.partition(b"\0")
            event = json.loads(text)
            if event.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.complaints.append(event["params"])
            if event.get("id") == self.number:
                assert "error" not in event, event
                return event["result"]

    def run(self, script):
        """A script's value."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, port):
        self.complaints.clear()
        self.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
        wait_until(lambda: self.run("document.readyState === 'complete' && document.title === 'nanogpt'"), 30)

    def fill(self, **values):
        for name, value in values.items():
            self.run(f"document.getElementById('{name}').value = {json.dumps(value)}")

    def press(self, name):
        self.run(f"document.getElementById('{name}').click()")

    def text(self, name):
        return self.run(f"document.getElementById('{name}').textContent")

    def status(self):
        """What the page says once it is done."""
        wait_until(lambda: self.run("!document.getElementById('run').disabled"), 30)
        return self.text("status")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.events)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


HOSTILE = "<img src=x onerror='document.title=1'><b>é𝄞</b><script>document.title=2</script>\n"


class Phrases(Bytes):
    """A token is a whole piece of HTML."""

    def decode_bytes(self, ids):
        return HOSTILE.encode() * len(ids)


def test_text_is_shown_as_text(browser):
    with serving(Parrot("a"), Phrases()) as client:
        browser.open(client.port)
        browser.fill(prompt="<b>x</b>\n", max_tokens=2, temperature=0)
        browser.press("run")
        assert browser.status() == "max_tokens reached"
        assert browser.text("old") == "<b>x</b>\n"
        assert browser.text("new") == 2 * HOSTILE
        assert browser.run("document.querySelectorAll('#text *').length") == 2  # the two spans and nothing inside them
        assert browser.run("document.title") == "nanogpt"
        assert browser.complaints == []


def test_options_reach_the_server(browser, monkeypatch):
    requests = []

    def answer(model, encoder, request):
        requests.append(request)
        return completions.answer(model, encoder, request)

    monkeypatch.setattr(api, "answer", answer)
    with serving(Parrot("abc\0"), Bytes()) as client:
        browser.open(client.port)
        browser.press("run")  # as it stands there
        assert browser.status() == "ended by the model or a stop"
        assert requests.pop() == Request([[0]], max_tokens=200, temperature=0.8, top_k=200, stream=True)
        browser.fill(prompt="x", max_tokens=9, temperature=0, seed=7, top_k=3, top_p=0.5)
        browser.press("run")
        assert browser.status() == "ended by the model or a stop"
        assert browser.text("new") == "abc"
        expected = Request([[ord("x")]], max_tokens=9, temperature=0, seed=7, top_k=3, top_p=0.5, stream=True)
        assert requests.pop() == expected
        browser.fill(stop_text="c")
        browser.press("run")
        assert browser.status() == "ended by the model or a stop"
        assert browser.text("new") == "ab"
        assert requests.pop() == replace(expected, stop=["c"])
        browser.fill(seed=2**60)  # past what a JavaScript number holds exactly, and still a request
        browser.press("run")
        assert browser.status() == "ended by the model or a stop"


def test_stop_ends_the_generation(browser):
    model = Parrot("abc")
    with serving(model, Bytes()) as client:
        browser.open(client.port)
        browser.fill(prompt="x", max_tokens=1000000)
        browser.press("run")
        wait_until(lambda: len(browser.text("new")) > 10)
        assert browser.run("document.getElementById('run').disabled")
        browser.press("stop")
        assert browser.status() == "stopped"
        wait_until(lambda: not client.server.worker.jobs)


def test_errors_and_the_key(browser):
    with serving(Parrot("abc"), Bytes(), secret=b"s3cret") as client:
        browser.open(client.port)
        browser.fill(prompt="x", max_tokens=3)
        browser.press("run")
        assert "Authorization: Bearer" in browser.status()
        browser.fill(key="s3cret", top_p=0)
        browser.press("run")
        assert browser.status() == "top_p is 0, expected 1e-06 to 1"
        browser.fill(top_p=1)
        browser.press("run")
        assert browser.status() == "max_tokens reached"
        assert browser.text("new") == "abc"


def test_the_policy_holds(browser):
    """A script that gets into the page does not run, and nothing is loaded from elsewhere."""
    with serving(Parrot("abc"), Bytes()) as client, serving(Parrot("abc"), Bytes()) as elsewhere:
        browser.open(client.port)
        browser.run("""{
            const script = document.createElement("script");
            script.textContent = "document.title = 'hacked'";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='document.title = 1'>");
        }""")
        fetched = browser.run(f"fetch('http://127.0.0.1:{elsewhere.port}/health').then(() => 'yes', () => 'no')")
        assert fetched == "no"
        assert browser.run("document.title") == "nanogpt"
        refused = [c["entry"]["text"] for c in browser.complaints if "entry" in c and "Content Security Policy" in str(c)]
        assert len(refused) >= 3


def test_other_pages_get_nothing(browser):
    """From another origin: the answer cannot be read, and a request that needs no permission is refused."""
    with serving(Parrot("abc"), Bytes()) as client, serving(Parrot("abc"), Bytes()) as elsewhere:
        browser.call("Page.navigate", url=f"http://127.0.0.1:{elsewhere.port}/nothing")  # no policy on a 404
        wait_until(lambda: browser.run("location.pathname === '/nothing' && document.readyState === 'complete'"), 30)
        url = f"http://127.0.0.1:{client.port}"
        assert browser.run(f"fetch('{url}/health').then(() => 'yes', () => 'no')") == "no"
        for kind in ("text/plain", "application/json"):
            options = {"method": "POST", "body": '{"prompt": "x"}', "headers": {"Content-Type": kind}, "mode": "cors"}
            assert browser.run(f"fetch('{url}/v1/completions', {json.dumps(options)}).then(() => 'yes', () => 'no')") == "no"
        browser.run(f"fetch('{url}/v1/completions', {{method: 'POST', body: '{{}}', mode: 'no-cors'}}).then(() => 1, () => 1)")
        assert client.server.worker.model.steps == 0

"""The server: answers, errors, limits, slow and rude clients, shutdown; the page. Real sockets, a tiny character model."""

import asyncio
import base64
import contextlib
import gc
import hashlib
import html.parser
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("starlette", reason="needs the extra [serve]")
pytest.importorskip("uvicorn", reason="needs the extra [serve]")

from nanogpt import sample, tokenizer
from nanogpt.config import GPTConfig
from nanogpt.model import GPT
from nanogpt.serve import ServeConfig, __main__, api, guard
from nanogpt.serve.completions import ApiError, Request
from nanogpt.tokenizer import CharTokenizer, GPT2Tokenizer
from tests.stand_ins import Bytes, character_model, save_run

CHARACTERS = "\n abcdé𝄞"


@pytest.fixture(scope="module")
def model():
    return character_model(CHARACTERS)


@pytest.fixture(scope="module")
def run_dir(model, tmp_path_factory):
    return save_run(model, CHARACTERS, tmp_path_factory.mktemp("run") / "out-tiny")


class Client:
    """Requests to a server on this machine; each on a connection of its own."""

    def __init__(self, port, server=None):
        self.port, self.server = port, server

    def connect(self, timeout=20):
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def ask(self, method, path, body=None, headers=()):
        """(status, headers, text)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return response.status, response.headers, response.read().decode()
        finally:
            connection.close()

    def post(self, body, **headers):
        """(status, the JSON of a completion)"""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, text = self.ask("POST", "/v1/completions", data, {"Content-Type": "application/json"} | headers)
        return status, json.loads(text)

    def stream(self, body):
        """The events of a streamed completion, and whether [DONE] ended them."""
        data = json.dumps(body | {"stream": True})
        status, headers, text = self.ask("POST", "/v1/completions", data, {"Content-Type": "application/json"})
        assert status == 200
        assert headers["content-type"].startswith("text/event-stream")
        events = text.split("\n\n")
        assert events.pop() == ""
        assert all(event.startswith("data: ") for event in events)
        done = events[-1] == "data: [DONE]"
        return [json.loads(event[6:]) for event in events[: len(events) - done]], done

    def raw(self, data, patient=True):
        """What the server sends back to some bytes, up to the connection's end; the impatient hang up at once."""
        with self.connect() as connection:
            received = b""
            with contextlib.suppress(ConnectionError):  # the server may close before it has read everything
                connection.sendall(data)
                if not patient:
                    connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(65536):
                    received += part
            return received


@contextlib.contextmanager
def serving(model, encoder=None, secret=b"", **keys):
    """A server in a thread."""
    config = ServeConfig(**{"port": 0, "out_dir": "out-tiny", "max_tokens": 10**6} | keys)
    config.check()
    listener = guard.listen(config)
    worker = api.Worker(model, encoder or CharTokenizer(CHARACTERS), config.max_queue)
    server = api.Server(config, worker, secret)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Client(listener.getsockname()[1], server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def client(model):
    with serving(model, client_timeout=20) as made:
        yield made


def samples(run_dir, capsys, *argv):
    sample.main([f"--out_dir={run_dir}", "--device=cpu", *argv])
    return capsys.readouterr().out.split(f"\n{sample.RULE}\n")[:-1]


class Parrot(GPT):
    """Says a text over and over, byte by byte; each step waits for a permit where there is a gate."""

    def __init__(self, text, gate=None):
        super().__init__(GPTConfig(block_size=2**16, vocab_size=256, n_layer=1, n_head=1, n_embd=8), torch.float32)
        self.text, self.gate, self.steps, self.caches = text.encode(), gate, 0, []

    def new_cache(self, *args):
        cache = super().new_cache(*args)
        self.caches.append(weakref.ref(cache))
        self.said = 0
        return cache

    def forward(self, idx, cache=None):
        if self.gate is not None:
            assert self.gate.acquire(timeout=20), "waited in vain for a permit"
        self.steps += 1
        if cache is not None:
            cache.length += idx.shape[1]
        self.said += 1
        byte = self.text[(self.said - 1) % len(self.text)]
        return torch.nn.functional.one_hot(torch.tensor([[byte]] * len(idx)), 256) * 1e4, None


class TestAnswers:
    def test_greedy_as_sample(self, client, run_dir, capsys):
        [expected] = samples(run_dir, capsys, "--start=ab", "--temperature=0", "--num_samples=1", "--max_new_tokens=40")
        status, made = client.post({"model": "out-tiny", "prompt": "ab", "temperature": 0, "max_tokens": 40, "echo": True})
        assert status == 200
        assert made["object"] == "text_completion"
        assert made["model"] == "out-tiny"
        assert made["choices"] == [{"index": 0, "text": expected, "logprobs": None, "finish_reason": "length"}]
        assert made["usage"] == {"prompt_tokens": 2, "completion_tokens": 40, "total_tokens": 42}

    def test_seeded_as_sample(self, client, run_dir, capsys):
        options = {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "seed": 4}
        argv = [f"--{name}={value}" for name, value in options.items()]
        expected = samples(run_dir, capsys, "--start=b", "--num_samples=3", "--max_new_tokens=20", *argv)
        body = options | {"prompt": "b", "n": 3, "max_tokens": 20, "echo": True}
        assert [choice["text"] for choice in client.post(body)[1]["choices"]] == expected
        assert len(set(expected)) == 3
        texts = {client.post({"prompt": ["b", "b"], "max_tokens": 30})[1]["choices"][i]["text"] for i in (0, 1, 0, 1)}
        assert len(texts) == 4  # no seed, no repetition

    def test_several_prompts_as_text_and_as_tokens(self, client):
        def texts(prompt, **options):
            status, made = client.post({"prompt": prompt, "temperature": 0, "max_tokens": 9} | options)
            assert status == 200, made
            assert [choice["index"] for choice in made["choices"]] == list(range(len(made["choices"])))
            return [choice["text"] for choice in made["choices"]], made["usage"]["prompt_tokens"]

        encoder = CharTokenizer(CHARACTERS)
        ab, count = texts("ab")
        assert count == 2
        assert texts(encoder.encode("ab")) == (ab, 2)
        assert texts(["ab"]) == (ab, 2)
        [cd], _ = texts("c d")
        assert texts(["ab", "c d"]) == ([*ab, cd], 5)
        assert texts([encoder.encode("ab"), encoder.encode("c d")]) == ([*ab, cd], 5)
        assert texts(["ab", "c d"], n=2) == ([*ab, *ab, cd, cd], 5)

    def test_stop_echo_and_nothing(self, client):
        body = {"prompt": "ab", "temperature": 0, "max_tokens": 12}
        [whole] = client.post(body)[1]["choices"]
        stop = whole["text"][4:6]
        cut = whole["text"].split(stop)[0]
        made = client.post(body | {"stop": ["zz", stop]})[1]
        assert made["choices"] == [whole | {"text": cut, "finish_reason": "stop"}]
        assert made["usage"]["completion_tokens"] == len(cut) + 2
        assert client.post(body | {"stop": stop})[1]["choices"][0]["text"] == cut
        made = client.post(body | {"max_tokens": 0, "echo": True})[1]
        assert made["choices"] == [whole | {"text": "ab"}]
        assert made["usage"]["completion_tokens"] == 0
        assert client.post({"prompt": "ab"})[1]["usage"]["completion_tokens"] == 16  # OpenAI's default

    def test_fields_that_change_nothing(self, client):
        body = {"prompt": "ab", "temperature": 0}
        neutral = {"best_of": 1, "logit_bias": {}, "logprobs": None, "presence_penalty": 0.0, "user": "me", "n": None}
        assert client.post(body | neutral)[1]["choices"] == client.post(body)[1]["choices"]

    @pytest.mark.parametrize("stop", [None, "c"])
    def test_stream_says_the_same(self, client, stop):
        body = {"prompt": ["ab", "é"], "n": 2, "seed": 3, "max_tokens": 30, "echo": True, "stop": stop}
        whole = client.post(body)[1]
        events, done = client.stream(body)
        assert done
        assert len({event["id"] for event in events}) == 1
        assert all("usage" not in event for event in events)
        for choice in whole["choices"]:
            mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
            assert "".join(part["text"] for part in mine) == choice["text"]
            assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        counted, _ = client.stream(body | {"stream_options": {"include_usage": True}})
        assert counted[-1]["choices"] == []
        assert counted[-1]["usage"] == whole["usage"]
        assert all(event["usage"] is None for event in counted[:-1])

    def test_characters_of_several_tokens_and_the_end_token(self):
        with serving(Parrot("é𝄞\0"), Bytes()) as client:
            events, _ = client.stream({"prompt": "x", "max_tokens": 50, "temperature": 0})
            assert [event["choices"][0]["text"] for event in events] == ["é", "𝄞", ""]
            assert events[-1]["choices"][0]["finish_reason"] == "stop"
            cut = client.post({"prompt": "", "max_tokens": 5, "temperature": 0})[1]  # "" begins with the end of a text
            assert cut["choices"][0]["text"] == "é"
            assert cut["usage"] == {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}

    def test_models_and_health(self, client):
        status, _, text = client.ask("GET", "/v1/models")
        [card] = json.loads(text)["data"]
        assert (status, card["id"], card["object"]) == (200, "out-tiny", "model")
        assert json.loads(client.ask("GET", "/v1/models/out-tiny")[2]) == card
        status, headers, text = client.ask("GET", "/health")
        assert (status, json.loads(text)) == (200, {"status": "ok", "model": "out-tiny", "requests": 0})
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def nested(depth):
    return b'{"prompt":' + b"[" * depth + b"]" * depth + b"}"


WRONG = [  # body, status, param, what the message says
    ({}, 400, "prompt", "missing"),
    (b"", 400, None, "not JSON"),
    (b"{", 400, None, "at character 1"),
    (b"[1]", 400, None, "JSON list"),
    (b"\xff{}", 400, None, "not UTF-8: byte 0"),
    ('{"prompt": "a"}'.encode("utf-16"), 400, None, "not UTF-8"),
    (b'\xef\xbb\xbf{"prompt": "a"}', 400, None, "BOM"),
    (b'{"prompt": "a", "prompt": "b"}', 400, "'prompt'", "twice"),
    (b'{"prompt": "a", "temperature": NaN}', 400, None, "NaN"),
    (b'{"prompt": "a", "temperature": -Infinity}', 400, None, "-Infinity"),
    (b'{"prompt": "a", "temperature": 1e999}', 400, "temperature", "expected 0 to 100"),
    (b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}", 400, None, "digits"),
    (b'{"prompt": "a", "max_tokens": 1' + b"0" * 4000 + b"}", 400, "max_tokens", "expected 0 to"),
    (nested(100), 400, "prompt", "a JSON array"),
    (nested(800), 400, "prompt", "a JSON array"),
    (nested(50000), 400, None, "nested too deeply"),
    (b'{"prompt": "\\ud800"}', 400, "prompt", "surrogate"),
    (b'{"prompt": "a", "stop": "\\udfff"}', 400, "stop", "surrogate"),
    (b'{"prompt": "a", "\\ud800": 1}', 400, "\\ud800", "unknown field"),
    (b'{"prompt": "a", "model": "\\ud800"}', 404, "model", "is not here"),
    ({"prompt": 5}, 400, "prompt", "expected a string"),
    ({"prompt": {"a": 1}}, 400, "prompt", "a JSON object"),
    ({"prompt": []}, 400, "prompt", "0 prompts"),
    ({"prompt": ["a", 1]}, 400, "prompt", "expected a string"),
    ({"prompt": [[1], "a"]}, 400, "prompt", "expected a string"),
    ({"prompt": [1, True]}, 400, "prompt", "expected a string"),
    ({"prompt": [[1, 2.0]]}, 400, "prompt", "2.0"),
    ({"prompt": [8]}, 400, "prompt", "has 8, expected tokens from 0 to 7"),
    ({"prompt": [-1]}, 400, "prompt", "has -1"),
    ({"prompt": ""}, 400, "prompt", "empty"),
    ({"prompt": "axb"}, 400, "prompt", "'x' at 1"),
    ({"prompt": "a" * 17}, 400, "prompt", "17 tokens, expected at most 16"),
    ({"prompt": ["a"] * 17}, 400, "prompt", "17 prompts"),
    ({"prompt": ["a"] * 9, "n": 2}, 400, "n", "expected 1 to 16"),
    ({"prompt": "a", "n": 0}, 400, "n", "expected 1 to 16"),
    ({"prompt": "a", "n": True}, 400, "n", "an integer"),
    ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "expected 0 to 1000000"),
    ({"prompt": "a", "max_tokens": 10**7}, 400, "max_tokens", "expected 0 to 1000000"),
    ({"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens", "an integer"),
    ({"prompt": "a", "max_tokens": "5"}, 400, "max_tokens", "'5', expected an integer"),
    ({"prompt": "a", "temperature": -0.1}, 400, "temperature", "-0.1"),
    ({"prompt": "a", "temperature": [1]}, 400, "temperature", "a number"),
    ({"prompt": "a", "top_p": 0}, 400, "top_p", "to 1"),
    ({"prompt": "a", "top_p": 1.1}, 400, "top_p", "1.1"),
    ({"prompt": "a", "top_k": -1}, 400, "top_k", "-1"),
    ({"prompt": "a", "seed": 2**63}, 400, "seed", "expected 0 to"),
    ({"prompt": "a", "stop": ""}, 400, "stop", "1 to 256 characters"),
    ({"prompt": "a", "stop": ["a"] * 5}, 400, "stop", "up to 4"),
    ({"prompt": "a", "stop": "a" * 257}, 400, "stop", "256"),
    ({"prompt": "a", "stop": [1]}, 400, "stop", "a list of strings"),
    ({"prompt": "a", "echo": 1}, 400, "echo", "true or false"),
    ({"prompt": "a", "stream": "yes"}, 400, "stream", "true or false"),
    ({"prompt": "a", "stream_options": {}}, 400, "stream_options", "stream with it"),
    ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x", "unknown"),
    ({"prompt": "a", "user": 1}, 400, "user", "a string"),
    ({"prompt": "a", "logprobs": 0}, 400, "logprobs", "not supported"),
    ({"prompt": "a", "best_of": 2}, 400, "best_of", "not supported"),
    ({"prompt": "a", "max_token": 5}, 400, "max_token", "did you mean max_tokens?"),
    ({"prompt": "a", "x" * 999: 5}, 400, "x" * 56 + "..", "unknown field"),
    ({"prompt": "a", "model": "gpt-4"}, 404, "model", "'gpt-4' is not here; this server has 'out-tiny'"),
    ({"prompt": "a", "model": 4}, 400, "model", "a string"),
]


class TestErrors:
    @pytest.mark.parametrize(("body", "status", "param", "message"), WRONG, ids=range(len(WRONG)))
    def test_wrong_request(self, client, body, status, param, message):
        got, made = client.post(body)
        error = made["error"]
        assert (got, error["param"]) == (status, param), error
        assert message in error["message"]
        assert len(error["message"]) < 300
        assert error["type"] == "invalid_request_error"

    def test_context_length_has_openais_code(self, client):
        assert client.post({"prompt": "a" * 17})[1]["error"]["code"] == "context_length_exceeded"

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/v1/chat/completions", 404),
            ("GET", "/v1/models/", 404),
            ("GET", "/v1/models/%2e%2e/out-tiny", 404),
            ("GET", "/../../etc/passwd", 404),
            ("GET", "/v1/completions", 405),
            ("OPTIONS", "/v1/completions", 405),
            ("DELETE", "/", 405),
        ],
    )
    def test_wrong_address_or_method(self, client, method, path, status):
        got, headers, text = client.ask(method, path)
        assert got == status
        assert json.loads(text)["error"]["type"] == "invalid_request_error"
        assert (headers["allow"] is not None) == (status == 405)

    @pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
    def test_wrong_content_type(self, client, kind):
        assert client.post({"prompt": "a"}, **{"Content-Type": kind})[0] == 415
        assert client.post({"prompt": "a"}, **{"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200

    def test_body_too_large(self, model):
        with serving(model, max_body=100) as client:
            fits = json.dumps({"prompt": "a", "max_tokens": 1}).encode().ljust(100)
            assert client.post(fits)[0] == 200
            assert client.post(fits + b" ")[0] == 413
            head = (
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
            )
            chunk = b"32\r\n" + b" " * 50 + b"\r\n"
            assert b" 413 " in client.raw(head + b"Transfer-Encoding: chunked\r\n\r\n" + 3 * chunk).split(b"\r\n")[0]
            assert b" 413 " in client.raw(head + b"Content-Length: 99999999999999999999\r\n\r\n").split(b"\r\n")[0]

    @pytest.mark.parametrize(
        ("host", "status"),
        [("localhost", 200), ("LOCALHOST:80", 200), ("127.0.0.1:9", 200), ("[::1]:9", 200)]
        + [
            (host, 403) for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "", "localhost:x", "1.2.3.4")
        ],
    )
    def test_host_where_bound_to_loopback(self, client, host, status):
        got, _, text = client.ask("GET", "/health", headers={"Host": host})
        assert got == status
        assert status == 200 or json.loads(text)["error"]["type"] == "permission_error"

    def test_host_and_origin_elsewhere(self, model):
        with serving(model, host="0.0.0.0") as client:
            assert client.ask("GET", "/health", headers={"Host": "gpu7.example"})[0] == 200
            for origin, status in (("http://gpu7.example", 200), ("http://evil.example", 403), ("null", 403)):
                assert client.ask("GET", "/health", headers={"Host": "gpu7.example", "Origin": origin})[0] == status

    def test_api_key(self, model):
        with serving(model, secret=b"s3cret") as client:
            body = {"prompt": "a", "max_tokens": 1}
            for given in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic s3cret"}, {"Authorization": "é"}):
                status, made = client.post(body, **given)
                assert (status, made["error"]["type"]) == (401, "authentication_error")
                assert "s3cret" not in str(made)
            assert client.ask("GET", "/v1/models")[0] == 401
            assert client.post(body, Authorization="bearer s3cret")[0] == 200
            assert client.ask("GET", "/health")[0] == client.ask("GET", "/")[0] == 200

    def test_a_failing_generation_is_answered_and_logged(self, capsys):
        class Broken(Parrot):
            def forward(self, idx, cache=None):
                if self.text == b"?":
                    raise RuntimeError("no more")
                return super().forward(idx, cache)

        with serving(model := Broken("?"), Bytes()) as client:
            status, made = client.post({"prompt": "a"})
            assert (status, made["error"]["type"]) == (500, "server_error")
            assert "no more" not in made["error"]["message"]
            assert "RuntimeError: no more" in capsys.readouterr().err
            events, done = client.stream({"prompt": "a"})
            assert "error" in events[-1]
            assert not done
            model.text = b"ok"
            assert client.post({"prompt": "a", "temperature": 0, "max_tokens": 2})[1]["choices"][0]["text"] == "ok"
            assert client.ask("GET", "/health")[0] == 200


def start_streaming(client, connection=None, **body):
    """A connection on which a stream was asked for."""
    connection = connection or client.connect()
    data = json.dumps({"prompt": "a", "max_tokens": 10**6, "stream": True} | body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    connection.sendall(f"{head}\r\n\r\n".encode() + data)
    return connection


class TestClients:
    @pytest.mark.parametrize("ahead", [b"", b"G"], ids=["", "ahead"])  # sent after the request, of a next one
    @pytest.mark.parametrize("stream", [True, False])
    def test_a_client_that_leaves_ends_its_generation(self, stream, ahead):
        model = Parrot("abc")
        with serving(model, Bytes(), max_queue=1) as client:
            connection = start_streaming(client, stream=stream)
            wait_until(lambda: model.steps > 20)
            connection.sendall(ahead)
            time.sleep(0.2)
            assert model.caches[0]() is not None
            assert stream is select_readable(connection, 20.0 if stream else 0.5)
            connection.close()
            wait_until(lambda: not client.server.worker.jobs and not client.server.server_state.connections)
            client.server.worker.thread.submit(int).result(15)  # the thread is free again
            assert model.steps < 2**16
            assert [cache() for cache in model.caches] == [None]
            assert client.post({"prompt": "a", "temperature": 0, "max_tokens": 3})[1]["choices"][0]["text"] == "abc"

    def test_one_at_a_time_some_wait_others_are_told(self):
        gate = threading.Semaphore(0)
        model = Parrot("abc", gate)
        with serving(model, Bytes(), max_queue=2) as client:
            clients = []
            for n in (1, 2, 3):  # one after the other, so that they are served in this order
                clients.append(start_streaming(client))
                wait_until(lambda n=n: len(client.server.worker.jobs) == n)
            first, second, third = clients
            status, headers, text = client.ask(
                "POST", "/v1/completions", json.dumps({"prompt": "a"}), {"Content-Type": "application/json"}
            )
            assert (status, headers["retry-after"]) == (429, "1")
            assert json.loads(text)["error"]["type"] == "rate_limit_error"
            assert client.ask("GET", "/health")[0] == 200  # the event loop is free
            second.close()  # one that waits leaves; it is never begun
            wait_until(lambda: len(client.server.worker.jobs) == 2)
            job, last = client.server.worker.jobs
            first.close()
            wait_until(job.left.is_set)
            assert json.loads(client.ask("GET", "/health")[2])["requests"] == 2  # the thread is still at it
            gate.release()
            wait_until(lambda: client.server.worker.jobs == [last])
            gate.release(20)
            third.recv(100)
            assert len(model.caches) == 2
            third.close()
            wait_until(last.left.is_set)
            gate.release(10)
            wait_until(lambda: not client.server.worker.jobs)

    def test_clients_that_left_the_queue_leave_nothing_there(self):
        gate = threading.Semaphore(0)
        with serving(Parrot("abc", gate), Bytes(), max_queue=1) as client:
            first = start_streaming(client)
            wait_until(lambda: client.server.worker.jobs)
            for _ in range(20):
                with start_streaming(client):
                    wait_until(lambda: len(client.server.worker.jobs) == 2)
                wait_until(lambda: len(client.server.worker.jobs) == 1)
            wait_until(lambda: len(client.server.server_state.connections) == 1)
            gc.collect()
            kept = [type(found) for found in gc.get_objects() if type(found) in (Request, api.Job)]
            assert sorted(kept, key=str) == [api.Job, Request]
            [job] = client.server.worker.jobs
            first.close()
            wait_until(job.left.is_set)
            gate.release(10)

    def test_more_than_a_request_ahead(self):
        """What is sent during an answer waits for its turn up to the size of one request."""
        get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
        gate = threading.Semaphore(0)
        with serving(Parrot("abc", gate), Bytes(), max_body=1000) as client:
            connection = start_streaming(client, max_tokens=1)
            wait_until(lambda: client.server.worker.jobs)
            connection.sendall(get + b"X: %s\r\nConnection: close\r\n\r\n" % (b"x" * 9000))
            time.sleep(0.2)
            gate.release()
            received = b""
            while part := connection.recv(65536):
                received += part
            assert b"data: [DONE]" in received
            assert b'"status": "ok"' in received
            connection.close()
            flood = start_streaming(client)
            wait_until(lambda: client.server.worker.jobs)
            with contextlib.suppress(ConnectionError):
                flood.sendall(500 * (get + b"\r\n"))  # 20 500 bytes
                while flood.recv(65536):
                    pass
            [job] = client.server.worker.jobs
            wait_until(job.left.is_set)
            gate.release()
            flood.close()

    def test_slow_clients_are_dropped_and_keep_nobody_waiting(self, model):
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n"
        )
        with serving(model, client_timeout=1.0) as client:
            silent, headers, body, drip = (client.connect() for _ in range(4))
            headers.sendall(head[:40])
            body.sendall(head + b"{")
            reader = client.connect()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            flood = threading.Thread(target=flood_without_reading, args=(reader,))
            flood.start()
            for byte in head[:13]:  # 1.3 s
                with contextlib.suppress(OSError):
                    drip.sendall(bytes([byte]))
                time.sleep(0.1)
            assert client.post({"prompt": "a", "max_tokens": 1})[0] == 200
            wait_until(lambda: not client.server.server_state.connections)
            assert silent.recv(1000) == b""
            assert headers.recv(1000).startswith(b"HTTP/1.1 408 ")
            assert body.recv(1000).startswith(b"HTTP/1.1 408 ")
            flood.join(10)
            assert not flood.is_alive()
            for connection in (silent, headers, body, drip, reader):
                connection.close()

    def test_a_stream_that_is_not_read_is_dropped(self):
        class Long(Bytes):
            def decode_bytes(self, ids):
                return b"abc" * 10_000 * len(ids)

        model = Parrot("abc")
        with serving(model, Long(), client_timeout=0.5) as client, socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # before it connects: the window stays small
            connection.connect(("127.0.0.1", client.port))
            start_streaming(client, connection)
            wait_until(lambda: model.steps > 2)
            wait_until(lambda: not client.server.worker.jobs and not client.server.server_state.connections)
            assert client.ask("GET", "/health")[0] == 200

    def test_a_body_that_drips_on_after_its_answer_is_dropped(self, model):
        head = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n"
        with serving(model, client_timeout=0.5) as client, client.connect() as connection:
            connection.sendall(head)
            assert connection.recv(1000).startswith(b"HTTP/1.1 404 ")
            end = time.monotonic() + 20
            with contextlib.suppress(OSError):
                while connection.send(b"x"):
                    assert time.monotonic() < end, "waited in vain"
                    time.sleep(0.05)

    def test_too_many_connections(self, model):
        with serving(model, max_connections=3) as client:
            idle = [client.connect() for _ in range(3)]
            wait_until(lambda: len(client.server.server_state.connections) == 3)
            status, headers, text = client.ask("GET", "/health")
            assert (status, headers["retry-after"]) == (503, "1")
            assert json.loads(text)["error"]["type"] == "server_error"
            wait_until(lambda: len(client.server.server_state.connections) == 3)
            idle += [client.connect() for _ in range(3)]
            with client.connect() as one_more, contextlib.suppress(ConnectionResetError):
                assert one_more.recv(100) == b""  # beyond twice the limit not even that
            for connection in idle:
                connection.close()
            wait_until(lambda: not client.server.server_state.connections)
            assert client.ask("GET", "/health")[0] == 200

    def test_kept_alive_and_pipelined(self, client):
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
        for _ in range(3):
            connection.request("GET", "/health")
            assert json.loads(connection.getresponse().read())["status"] == "ok"
        connection.close()
        get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with client.connect() as connection:
            connection.sendall(3 * get)
            received = b""
            while received.count(b'"status"') < 3:
                received += connection.recv(10000)
            assert received.count(b"HTTP/1.1 200 OK") == 3

    def test_who_waits_at_the_end_is_never_begun(self):
        gate = threading.Semaphore(0)
        worker = api.Worker(model := Parrot("abc", gate), Bytes(), 1)

        async def run():
            jobs = [worker.submit(Request([[97]])) for _ in range(2)]
            worker.stop()
            assert worker.jobs == jobs[:1]
            for job in jobs:
                with pytest.raises(ApiError, match="shutting down"):
                    await anext(aiter(job))
            gate.release()
            while worker.jobs:
                await asyncio.sleep(0.01)

        asyncio.run(asyncio.wait_for(run(), 30))
        worker.thread.shutdown()
        assert model.steps == 1

    def test_shutdown_lets_answers_end_then_ends_them(self):
        model = Parrot("abc")
        with serving(model, Bytes(), shutdown_timeout=0.5) as client:
            connection = start_streaming(client)
            wait_until(lambda: model.steps > 20)
            client.server.should_exit = True
            received = b""
            while part := connection.recv(65536):
                received += part
            assert b"shutting down" in received[-400:]
            assert b"[DONE]" not in received
        gate = threading.Semaphore(1)
        with serving(Parrot("abc", gate), Bytes(), shutdown_timeout=20) as client:
            connection = start_streaming(client, max_tokens=5)
            connection.recv(100)
            client.server.should_exit = True
            time.sleep(0.3)
            gate.release(10)
            received = b""
            while part := connection.recv(65536):
                received += part
            assert b"data: [DONE]" in received


def select_readable(connection, seconds):
    connection.settimeout(seconds)
    try:
        return bool(connection.recv(10))
    except TimeoutError:
        return False


def flood_without_reading(connection):
    """Thousands of pipelined requests for the page, until the server hangs up."""
    with contextlib.suppress(OSError):
        connection.settimeout(10)
        for _ in range(10000):
            connection.sendall(20 * b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")


class Command:
    """python -m nanogpt.serve in a process of its own."""

    def __init__(self, *argv):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanogpt.serve", "--port=0", "--device=cpu", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.match(r"serving at http://127\.0\.0\.1:(\d+)\n", line):
                break
        assert found, "".join(self.lines)
        self.client = Client(int(found[1]))
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self.reader.start()

    def usage(self):
        """(open files, threads, MiB of memory)"""
        proc = Path(f"/proc/{self.process.pid}")
        resident = int(re.search(r"VmRSS:\s+(\d+)", (proc / "status").read_text())[1]) / 1024
        return len(os.listdir(proc / "fd")), len(os.listdir(proc / "task")), resident


def malformed(rng):
    """(bytes to send, whether they are enough to be answered at once)."""
    good = json.dumps({"prompt": "ab", "max_tokens": 3, "temperature": 0}).encode()
    values = [None, True, -1, 0, 1e308, 2**70, "", "é", "\0", [], {}, [[]], [{}], [None], "a" * 3000, [0] * 500, -0.0, "\ud83d"]
    names = ["prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "echo", "stream", "model", "x"]

    def request(body, *headers, path=b"/v1/completions", method=b"POST", length=None):
        lines = [
            b"%s %s HTTP/1.1" % (method, path),
            b"Host: localhost",
            b"Content-Type: application/json",
            b"Connection: close",
        ]
        lines += [b"Content-Length: %d" % (len(body) if length is None else length), *headers]
        return b"\r\n".join(lines) + b"\r\n\r\n" + body

    match rng.randrange(9):
        case 0:  # wrong types and values, at least one of them a mistake
            body = {name: rng.choice(values) for name in rng.sample(names, rng.randrange(1, 5))} | {"x": 1}
            return request(json.dumps(body).encode()), True
        case 1:  # JSON with a wound
            at = rng.randrange(len(good))
            return request(good[:at] + bytes([rng.choice(b'{}[]",:\\\0\xff')]) + good[at:] + b"}"), True
        case 2:  # cut JSON
            return request(good[: rng.randrange(len(good))]), True
        case 3:  # another encoding
            return request(good.decode().encode(rng.choice(["utf-16", "utf-32", "cp500"]))), True
        case 4:  # deep or wide
            return request(rng.choice([nested(rng.randrange(2, 9**5)), b"[" * rng.randrange(9**5), b'{"x":' * 9**4])), True
        case 5:  # lengths that lie, or twice
            kind = rng.randrange(4)
            if kind == 0:
                return request(good, length=len(good) + rng.randrange(1, 99)), False
            if kind == 1:
                return request(good, b"Content-Length: %d" % rng.randrange(3)), True
            if kind == 2:
                return request(good, b"Transfer-Encoding: chunked"), False
            return request(good).replace(b"Content-Length: ", rng.choice([b"Content-Length: -", b"Content-Length: x"])), True
        case 6:  # bytes
            return rng.randbytes(rng.randrange(1, 3000)), False
        case 7:  # headers
            header = rng.choice(
                [b"A" * 300000 + b": x", b"X: " + b"y" * 300000, b"no colon", b"\0: x", b"X:\0", b"Host: other"]
            )
            return request(good, header), True
        case _:  # methods and addresses
            path = rng.choice(
                [b"/%00", b"/\xff", b"*", b"//", b"/v1/../etc", b"http://[", b"/" + b"a" * 20000, b"/v1/models/%ff"]
            )
            method = rng.choice([b"GET", b"BREW", b"get", b"\x16\x03\x01", b"CONNECT"])
            return request(b"", path=path, method=method), False


def test_a_thousand_malformed_requests_and_rude_clients(run_dir, capsys):
    """No crash, no leak, clear errors; and then the same greedy text as `nanogpt.sample`."""
    [expected] = samples(run_dir, capsys, "--start=ab", "--temperature=0", "--num_samples=1", "--max_new_tokens=40")
    command = Command(f"--out_dir={run_dir}", "--client_timeout=2", "--max_tokens=1000000")
    client, rng = command.client, random.Random(7)
    good = {"prompt": "ab", "temperature": 0, "max_tokens": 40, "echo": True}
    try:
        for i in range(1100):
            data, clear = malformed(rng)
            patient = clear or i % 50 == 1
            received = client.raw(data, patient)
            status = received.split(b"\r\n")[0]
            assert re.fullmatch(rb"HTTP/1\.1 4\d\d .*|", status), (data[:300], received[:300])
            if patient:
                error = json.loads(received.partition(b"\r\n\r\n")[2])["error"]
                assert error["message"], (data[:300], received[:300])
            if i % 50 == 0:
                start_streaming(client).close()  # leaves before the first word
                with start_streaming(client) as connection:
                    connection.recv(300)  # leaves in the middle
                with client.connect() as connection:
                    connection.sendall(b"POST /v1/comp")  # leaves in its headers
                assert client.post(good)[1]["choices"][0]["text"] == expected
            if i == 100:
                wait_until(lambda: json.loads(client.ask("GET", "/health")[2])["requests"] == 0)
                time.sleep(2.5)
                before = command.usage()
        wait_until(lambda: json.loads(client.ask("GET", "/health")[2])["requests"] == 0)
        time.sleep(2.5)
        after = command.usage()
        assert after[0] <= before[0], "open files"
        assert after[1] <= before[1] + 4, "threads"  # of the pool that parses, which grows to its size
        assert after[2] <= before[2] + 12, "MiB"
        assert client.post(good)[1]["choices"][0]["text"] == expected
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(20) == 0
        command.reader.join(20)
        assert "Traceback" not in "".join(command.lines)
    finally:
        command.process.kill()
        command.process.wait()


class TestCommand:
    def refuses(self, capsys, argv):
        with pytest.raises(SystemExit) as stopped:
            __main__.main(argv)
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert error.count("\n") == 1
        return error

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("--port=70000", "port=70000"),
            ("--prt=1", "did you mean --port"),
            ("--host=", "host="),
            ("--host=256.1.1.1", "host=256.1.1.1"),
            ("--max_body=0", "max_body=0"),
            ("--max_prompt_tokens=-1", "max_prompt_tokens=-1"),
            ("--max_tokens=0", "max_tokens=0"),
            ("--max_choices=0", "max_choices=0"),
            ("--max_queue=-1", "max_queue=-1"),
            ("--max_connections=0", "max_connections=0"),
            ("--client_timeout=0", "client_timeout=0"),
            ("--shutdown_timeout=-1", "shutdown_timeout=-1"),
            ("--init_from=scratch", "init_from=scratch"),
            ("--out_dir=/nonexistent", "/nonexistent"),
            ("--api_key_file=/nonexistent", "api_key_file=/nonexistent"),
        ],
    )
    def test_refuses_in_one_line(self, run_dir, capsys, option, message):
        assert message in self.refuses(capsys, [f"--out_dir={run_dir}", "--port=0", "--device=cpu", option])

    def test_port_in_use(self, capsys):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            assert "in use" in self.refuses(capsys, [f"--port={taken.getsockname()[1]}"])

    def test_a_table_that_cannot_be_fetched(self, capsys, monkeypatch):
        def fetch(asset):
            raise ValueError(f"{asset.filename}: no network")

        monkeypatch.setattr(tokenizer.assets, "fetch", fetch)
        monkeypatch.setattr(__main__, "load", lambda config: (None, GPT2Tokenizer()))
        assert "gpt2-encoder.json: no network" in self.refuses(capsys, ["--port=0"])

    @pytest.mark.parametrize("module", ["starlette", "uvicorn"])
    def test_names_the_extra_that_is_missing(self, capsys, monkeypatch, module):
        for name in [name for name in sys.modules if name.split(".")[0] == module or name.startswith("nanogpt.serve.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(sys.modules["nanogpt.serve"], "api")
        monkeypatch.delattr(sys.modules["nanogpt.serve"], "guard")
        monkeypatch.setattr(sys, "meta_path", [Missing(module), *sys.meta_path])
        assert 'pip install -e ".[serve]"' in self.refuses(capsys, [])

    @pytest.mark.parametrize("content", [b"", b" \n", b"two words", "schlüssel".encode()])
    def test_key_file_without_a_key(self, tmp_path, content):
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(ValueError, match="api_key_file="):
            __main__.read_key(str(tmp_path / "key"))
        (tmp_path / "key").write_bytes(b"abc-123\n")
        assert __main__.read_key(str(tmp_path / "key")) == b"abc-123"
        assert __main__.read_key("") == b""

    def test_limits_are_applied(self, model):
        keys = {"max_prompt_tokens": 3, "max_tokens": 5, "max_choices": 2}
        with serving(model, **keys) as client:
            assert client.post({"prompt": "abc", "max_tokens": 5, "n": 2})[0] == 200
            assert client.post({"prompt": "abc"})[1]["usage"]["completion_tokens"] == 5
            for wrong in ({"prompt": "abca"}, {"prompt": "abc", "max_tokens": 6}, {"prompt": "abc", "n": 3}):
                assert client.post(wrong)[0] == 400


def test_the_thread_works_on_the_models_device(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((device, threading.current_thread().name)))
    for device in ("cpu", "cuda:1"):
        weight = type("Weight", (), {"device": torch.device(device)})
        worker = api.Worker(type("Model", (), {"lm_head": type("Head", (), {"weight": weight})}), None, 1)
        worker.thread.submit(int).result(10)
        worker.thread.shutdown()
    assert chosen == [(torch.device("cuda:1"), "generate_0")]


class Missing:
    """An import hook: the module is not installed."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.name)


class Outline(html.parser.HTMLParser):
    """What a page loads and runs."""

    def __init__(self, text):
        super().__init__()
        self.inside, self.texts, self.attributes, self.tags = None, {"script": "", "style": ""}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside in self.texts:
            self.texts[self.inside] += data


def test_page_loads_nothing_and_runs_its_own_script_only(client):
    status, headers, text = client.ask("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    page, rules = Outline(text), dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    for tag in ("script", "style"):
        expected = base64.b64encode(hashlib.sha256(page.texts[tag].encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{expected}'"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert not {"src", "href", "action", "style", "srcset"} & set(page.attributes)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert not {"link", "iframe", "img", "object", "base"} & set(page.tags)
    assert "http" not in text
    for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function("):
        assert way not in text

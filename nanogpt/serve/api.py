"""The application: OpenAI's completions API over one model, one answer at a time.

A request is checked, waits its turn, and is drawn on a thread of its own; the event loop only moves text. Whoever leaves ends
the generation at its next token.
"""

import asyncio
import base64
import hashlib
import json
import logging
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from nanogpt.model import GPT
from nanogpt.serve import ServeConfig
from nanogpt.serve.completions import ApiError, Limits, Piece, Request, answer, parse
from nanogpt.serve.guard import MAX_HEADERS, Guard, is_loopback, make_protocol, to_error, to_json
from nanogpt.tokenizer import Tokenizer

PAGE = Path(__file__).with_name("page.html")
log = logging.getLogger("uvicorn.error")


class Job:
    """A request's turn with the model.

    Attributes:
        steps: what the thread has drawn; an ApiError in place of what will not come, None at the end.
        left: tells the thread to stop.
    """

    def __init__(self, request: Request):
        self.request = request
        self.steps: asyncio.Queue[list[Piece] | ApiError | None] = asyncio.Queue()
        self.left = threading.Event()

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        while (step := await self.steps.get()) is not None:
            if isinstance(step, ApiError):
                raise step
            yield step


class Worker:
    """The thread that draws, and the queue before it.

    Attributes:
        jobs: the one that the thread works on, then those that wait. The event loop's.
    """

    def __init__(self, model: GPT, encoder: Tokenizer, max_queue: int):
        self.model, self.encoder, self.max_queue = model, encoder, max_queue
        device = model.lm_head.weight.device
        on_device = (torch.cuda.set_device, (device,)) if device.type == "cuda" else ()  # each thread has a current one
        self.thread = ThreadPoolExecutor(1, "generate", *on_device)
        self.jobs: list[Job] = []
        self.closing = False

    def submit(self, request: Request) -> Job:
        """Queues a request.

        Raises:
            ApiError: 429 where too many wait, 503 while the server shuts down.
        """
        if self.closing:
            raise ApiError(503, "the server is shutting down", retry_after=10)
        if len(self.jobs) > self.max_queue:
            raise ApiError(429, f"{len(self.jobs)} requests are before this one; try again", code="queue_full", retry_after=1)
        job = Job(request)
        self.jobs.append(job)
        if len(self.jobs) == 1:
            self.begin(job)
        return job

    def begin(self, job: Job) -> None:
        loop = asyncio.get_running_loop()

        def work() -> None:
            with closing(answer(self.model, self.encoder, job.request)) as steps:
                for step in steps:
                    if job.left.is_set():
                        return
                    if step:
                        loop.call_soon_threadsafe(job.steps.put_nowait, step)

        def done(future: asyncio.Future[None]) -> None:
            self.jobs.remove(job)
            if (failure := future.exception()) is not None:
                log.error("a generation failed", exc_info=failure)
                job.steps.put_nowait(ApiError(500, "the generation failed; the server's log says why"))
            job.steps.put_nowait(None)
            if self.jobs:
                self.begin(self.jobs[0])

        loop.run_in_executor(self.thread, work).add_done_callback(done)

    def leave(self, job: Job) -> None:
        """Nobody waits for it any more: it ends at its next token, or never begins."""
        job.left.set()
        if job in self.jobs[1:]:
            self.jobs.remove(job)

    def stop(self) -> None:
        """Ends what runs and what waits, with an error to each client."""
        self.closing = True
        for job in self.jobs:
            job.steps.put_nowait(ApiError(503, "the server is shutting down", retry_after=10))
            job.left.set()
        del self.jobs[1:]


class Answer:
    """An ASGI response: the completion, whole or as server-sent events, for as long as the client is there."""

    def __init__(self, worker: Worker, request: Request, model_name: str):
        self.worker, self.request = worker, request
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model_name,
        }
        self.tokens = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        job = self.worker.submit(self.request)
        written = asyncio.create_task((self.stream if self.request.stream else self.whole)(job, scope, receive, send))
        gone = asyncio.create_task(self.disconnected(receive))
        try:
            await asyncio.wait({written, gone}, return_when=asyncio.FIRST_COMPLETED)
            if written.done():
                written.result()
        finally:
            self.worker.leave(job)
            for task in (written, gone):
                task.cancel()
            await asyncio.gather(written, gone, return_exceptions=True)

    @staticmethod
    async def disconnected(receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    def choice(self, piece: Piece) -> dict[str, Any]:
        self.tokens += piece.tokens if piece.finish else 0
        return {"index": piece.index, "text": piece.text, "logprobs": None, "finish_reason": piece.finish}

    def usage(self) -> dict[str, int]:
        prompt = self.request.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": self.tokens, "total_tokens": prompt + self.tokens}

    async def whole(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        choices: dict[int, dict[str, Any]] = {}
        async for step in job:
            for piece in step:
                new = self.choice(piece)
                before = choices.get(piece.index, {"text": ""})["text"]
                choices[piece.index] = new | {"text": before + piece.text}
        content = self.head | {"choices": [choices[i] for i in sorted(choices)], "usage": self.usage()}
        await to_json(200, content)(scope, receive, send)

    async def stream(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        async def events(*contents: dict[str, Any] | str, more: bool = True) -> None:
            data = [content if isinstance(content, str) else json.dumps(content) for content in contents]
            body = "".join(f"data: {text}\n\n" for text in data).encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        usage = {"usage": None} if self.request.include_usage else {}
        try:
            async for step in job:
                await events(*(self.head | {"choices": [self.choice(piece)]} | usage for piece in step))
        except ApiError as error:  # the status is sent already
            await events(error.body(), more=False)
            return
        if self.request.include_usage:
            await events(self.head | {"choices": [], "usage": self.usage()})
        await events("[DONE]", more=False)


async def read_body(request: HttpRequest, limit: int, seconds: float) -> bytes:
    """A request's body.

    Raises:
        ApiError: 408 for a client that takes too long, 413 for more than limit bytes.
    """
    too_large = ApiError(413, f"the body has more than {limit} bytes")
    if int(request.headers.get("content-length", "0")) > limit:  # the protocol has checked that it is a number
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {seconds:g} s") from None
    return bytes(body)


def policy(page: str) -> str:
    """The Content-Security-Policy under which only the page's own script and style run, and talk to this server only."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def make_app(config: ServeConfig, worker: Worker, secret: bytes = b"") -> ASGIApp:
    """The application, as ASGI."""
    encoder = worker.encoder
    prompt_tokens = config.max_prompt_tokens or worker.model.config.block_size
    limits = Limits(prompt_tokens, config.max_tokens, config.max_choices)
    name = Path(config.out_dir if config.init_from == "resume" else config.init_from).resolve().name
    page = PAGE.read_text(encoding="utf-8")
    page_headers = {"content-security-policy": policy(page), "cache-control": "no-store"}
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "nanogpt"}

    async def index(request: HttpRequest) -> Response:
        return Response(page, headers=page_headers, media_type="text/html")

    async def health(request: HttpRequest) -> Response:
        state = "shutting down" if worker.closing else "ok"
        return to_json(503 if worker.closing else 200, {"status": state, "model": name, "requests": len(worker.jobs)})

    async def models(request: HttpRequest) -> Response:
        return to_json(200, {"object": "list", "data": [card]})

    async def model(request: HttpRequest) -> Response:
        if request.path_params["name"] != name:
            raise ApiError(404, "no such model; GET /v1/models lists what there is", param="model", code="model_not_found")
        return to_json(200, card)

    async def completions(request: HttpRequest) -> ASGIApp:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a form of a page from elsewhere cannot send
            raise ApiError(415, "expected the header Content-Type: application/json")
        body = await read_body(request, config.max_body, config.client_timeout)
        return Answer(worker, await run_in_threadpool(parse, body, name, encoder, limits), name)

    async def on_http(request: HttpRequest, error: HTTPException) -> Response:
        methods = (error.headers or {}).get("Allow")
        message = f"expected {methods}" if methods else f"there is nothing at this address: {error.detail}"
        return to_json(error.status_code, ApiError(error.status_code, message).body(), error.headers)

    async def on_api(request: HttpRequest, error: ApiError) -> Response:
        return to_error(error)

    async def on_gone(request: HttpRequest, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # to nobody

    async def on_bug(request: HttpRequest, error: Exception) -> Response:
        return to_error(ApiError(500, "this is a fault of the server's; its log says more"))

    app = Starlette(
        routes=[
            Route("/", index),
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/completions", completions, methods=["POST"]),
        ],
        exception_handlers={HTTPException: on_http, ApiError: on_api, ClientDisconnect: on_gone, Exception: on_bug},
    )
    app.router.redirect_slashes = False
    return Guard(app, config.host, secret)


class Server(uvicorn.Server):
    """uvicorn's server, whose shutdown ends the answers that take too long with an error to the client."""

    def __init__(self, config: ServeConfig, worker: Worker, secret: bytes = b""):
        super().__init__(
            uvicorn.Config(
                make_app(config, worker, secret),
                http=make_protocol(config),
                ws="none",
                lifespan="off",
                proxy_headers=False,
                server_header=False,
                h11_max_incomplete_event_size=MAX_HEADERS,
                timeout_graceful_shutdown=int(config.shutdown_timeout) + 10,
            )
        )
        self.worker, self.seconds = worker, config.shutdown_timeout

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            print(f"serving at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self.seconds, self.worker.stop)
        await super().shutdown(sockets)
        self.worker.stop()
        await asyncio.to_thread(self.worker.thread.shutdown)


def serve(config: ServeConfig, model: GPT, encoder: Tokenizer, secret: bytes, listener: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    if not is_loopback(config.host) and not secret:
        print(f"host={config.host}: whoever reaches it may use the model; --api_key_file=FILE asks for a key", file=sys.stderr)
    server = Server(config, Worker(model, encoder, config.max_queue), secret)
    for number in (signal.SIGTERM, signal.SIGINT):  # what uvicorn catches it raises once more after the shutdown
        signal.signal(number, server.handle_exit)
    server.run([listener])

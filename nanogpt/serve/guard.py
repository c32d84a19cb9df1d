"""What a server needs besides answers: who may ask, deadlines for slow clients, a limit of connections, errors in JSON."""

import asyncio
import hmac
import ipaddress
import json
import re
import socket
from typing import Any

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanogpt.serve import ServeConfig
from nanogpt.serve.completions import ApiError

MAX_HEADERS = 16384  # bytes of a request's


def to_json(status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    # ASCII escapes: no text of a model's or a client's can break the encoding, or an event stream's lines
    return Response(json.dumps(content), status, headers, "application/json")


def to_error(error: ApiError) -> Response:
    return to_json(error.status, error.body(), {"retry-after": str(error.retry_after)} if error.retry_after else None)


class Guard:
    """ASGI middleware: who may ask, and the headers of every response.

    A page from elsewhere can make a browser send requests here. Its name for this server (DNS rebinding) is refused where the
    server is bound to loopback, its Origin everywhere, and there are no CORS headers.
    """

    HEADERS = (
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-resource-policy", "same-origin"),
        ("x-frame-options", "DENY"),
    )

    def __init__(self, app: ASGIApp, host: str, secret: bytes):
        self.app, self.secret = app, secret
        name = f"[{host}]" if ":" in host else host
        self.hosts = {"localhost", "127.0.0.1", "[::1]", name.lower()} if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.HEADERS:
                    headers.setdefault(name, value)
            await send(message)

        try:
            self.check(Headers(scope=scope), scope["path"])
        except ApiError as error:
            await to_error(error)(scope, receive, send_safely)
        else:
            await self.app(scope, receive, send_safely)

    def check(self, headers: Headers, path: str) -> None:
        host = headers.get("host", "")
        if self.hosts is not None and re.sub(r":\d*$", "", host).lower() not in self.hosts:
            raise ApiError(403, "the Host header does not name this machine")
        origin = headers.get("origin")
        if origin is not None and (origin == "null" or origin.partition("//")[2] != host):
            raise ApiError(403, "requests of pages from elsewhere are refused")
        if self.secret and path.startswith("/v1/"):
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.secret):
                raise ApiError(
                    401, "expected the header Authorization: Bearer KEY with this server's key", code="invalid_api_key"
                )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


async def full(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers in the application's place where there are too many clients."""
    error = to_error(ApiError(503, "too many connections; try again", retry_after=1))
    error.headers["connection"] = "close"
    await error(scope, receive, send)


def make_protocol(config: ServeConfig) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with what it lacks: a deadline for slow clients, a limit of connections, errors in JSON."""

    class Protocol(H11Protocol):
        """The deadline runs whenever the client has to act: until its request's headers are there, while it is behind with
        reading, and after an answer. It does not run while the application works; that reads the body under its own. What
        comes during an answer is read, else nobody would see the client leave, and kept up to the size of one request.
        """

        deadline: asyncio.TimerHandle | None = None
        refused = False  # an error was sent, and what still comes is read and forgotten, else the client might not get to it

        def arm(self) -> None:
            self.disarm()
            self.deadline = self.loop.call_later(config.client_timeout, self.expire)

        def disarm(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()

        def answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def expire(self) -> None:
            if self.answering() or self.refused or self.transport.is_closing():
                self.transport.abort()
            elif self.conn.trailing_data[0]:
                self.refuse(408, f"the request did not come within {config.client_timeout:g} s")
            else:
                self.transport.close()
                self.arm()  # for a client that does not take the last bytes either

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > 2 * config.max_connections:
                transport.abort()
            elif len(self.connections) > config.max_connections:
                self.app = full
            self.arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self.disarm()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if not self.refused:
                super().data_received(data)

        def handle_events(self) -> None:
            super().handle_events()
            if not self.answering():
                return
            if not self.flow.write_paused:
                self.disarm()
            if self.conn.their_state is h11.DONE:
                self.flow.resume_reading()
                if len(self.conn.trailing_data[0]) > MAX_HEADERS + config.max_body:
                    self.transport.abort()

        def on_response_complete(self) -> None:
            self.arm()
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.arm()

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.answering():
                self.disarm()

        def send_400_response(self, msg: str) -> None:
            self.refuse(400, f"this is not HTTP/1.1, or its headers have more than {MAX_HEADERS} bytes")

        def refuse(self, status: int, message: str) -> None:
            if self.answering():  # half an answer is out, or will be
                self.transport.abort()
                return
            body = json.dumps(ApiError(status, message).body()).encode()
            head = f"HTTP/1.1 {status} Error\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
            self.transport.write_eof()
            self.refused = True
            self.arm()

    return Protocol


def listen(config: ServeConfig) -> socket.socket:
    """A socket bound to the address.

    Raises:
        ValueError: where it cannot be had.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ValueError(f"host={config.host} port={config.port}: {error.strerror}") from error
    return listener

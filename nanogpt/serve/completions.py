"""A completion request in OpenAI's form: what it may say, and what answers it. No HTTP in here."""

import difflib
import json
import secrets
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch

from nanogpt.generate import Text, write
from nanogpt.model import GPT
from nanogpt.tokenizer import Tokenizer

MAX_STOPS, MAX_STOP_LENGTH = 4, 256  # OpenAI's number; characters
# OpenAI's fields that change nothing at these values, and are refused at others
NEUTRAL: dict[str, tuple] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What the client is told: an HTTP status, a sentence, the field that is wrong, and how long to wait."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 0):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass
class Limits:
    """What one request may ask for: tokens of a prompt, tokens of an answer, answers."""

    prompt_tokens: int
    max_tokens: int
    choices: int


@dataclass
class Request:
    """A request that was checked; the names are OpenAI's, top_k is ours (0: all)."""

    prompts: list[list[int]]
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    echo: bool = False
    stream: bool = False
    include_usage: bool = False

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


class Piece(NamedTuple):
    """New text of one choice; the last one of a choice says why it ended (stop, length) and how many tokens it took."""

    index: int
    text: str
    finish: str | None = None
    tokens: int = 0


def shown(value: Any) -> str:
    """A client's value as an error may repeat it."""
    if isinstance(value, list | dict):
        return "a JSON array" if isinstance(value, list) else "a JSON object"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in a request's body.

    Raises:
        ApiError: 400 for anything else, NaN, Infinity and a name given twice among it.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ApiError(400, f"{shown(name)} is given twice", param=shown(name))
            found[name] = value
        return found

    def constant(name: str) -> float:
        raise ApiError(400, f"{name} is not a number that JSON has")

    try:
        data = json.loads(body.decode("utf-8"), object_pairs_hook=once, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ApiError(400, f"the body is not JSON that can be read: {error}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    if not isinstance(data, dict):
        raise ApiError(400, f"the body is a JSON {type(data).__name__}, expected an object")
    return data


def _number(data: dict[str, Any], name: str, default: Any, low: float, high: float, whole: bool) -> Any:
    value = data.pop(name, None)
    if value is None:
        return default
    if type(value) is not int and (whole or type(value) is not float):
        raise ApiError(400, f"{name} is {shown(value)}, expected {'an integer' if whole else 'a number'}", param=name)
    if not low <= value <= high:  # Infinity, which JSON writes as 1e999, as well
        raise ApiError(400, f"{name} is {shown(value)}, expected {low} to {high}", param=name)
    return value if whole else float(value)


def _flag(data: dict[str, Any], name: str) -> bool:
    value = data.pop(name, None)
    if value is not None and type(value) is not bool:
        raise ApiError(400, f"{name} is {shown(value)}, expected true or false", param=name)
    return bool(value)


def _texts(data: dict[str, Any], name: str) -> list[str]:
    """A text or a list of them, none of them with half a surrogate pair."""
    value = data.pop(name, None)
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ApiError(400, f"{name} is {shown(value)}, expected a string or a list of strings", param=name)
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ApiError(400, f"{name} has half a surrogate pair, which is no character", param=name)
    return texts


def _prompts(data: dict[str, Any], encoder: Tokenizer, limits: Limits, n: int) -> list[list[int]]:
    """The tokens of each prompt: strings, lists of tokens, or one of either."""
    value = data.get("prompt")
    if value is None:
        raise ApiError(400, "prompt is missing", param="prompt")
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        value = [value]
    several = value if isinstance(value, list) else [value]
    if not several or len(several) * n > limits.choices:
        message = f"{len(several)} prompts with n={n}: expected 1 to {limits.choices} completions"
        raise ApiError(400, message, param="prompt" if n == 1 else "n")
    if all(isinstance(item, list) for item in several):
        prompts = several
        for token in (token for prompt in prompts for token in prompt):
            if type(token) is not int or not 0 <= token < encoder.vocab_size:
                message = f"prompt has {shown(token)}, expected tokens from 0 to {encoder.vocab_size - 1}"
                raise ApiError(400, message, param="prompt")
    else:
        try:
            prompts = [encoder.encode(text) for text in _texts({"prompt": value}, "prompt")]
        except ValueError as error:
            raise ApiError(400, f"prompt: {error}", param="prompt") from None
    data.pop("prompt")
    start = [] if encoder.eot is None else [encoder.eot]
    prompts = [prompt or start for prompt in prompts]
    if not all(prompts):
        raise ApiError(400, "prompt is empty, and this model's tokenizer has no token that begins a text", param="prompt")
    longest = max(len(prompt) for prompt in prompts)
    if longest > limits.prompt_tokens:
        message = f"prompt has {longest} tokens, expected at most {limits.prompt_tokens}"
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")
    return prompts


def parse(body: bytes, model_name: str, encoder: Tokenizer, limits: Limits) -> Request:
    """Reads a request. A field that is null has its default; one that is not known is refused, never ignored.

    Raises:
        ApiError: 400 with the field, 404 for another model's name.
    """
    data = parse_json(body)
    name = data.pop("model", None)
    if name is not None and not isinstance(name, str):
        raise ApiError(400, f"model is {shown(name)}, expected a string", param="model")
    if name not in (None, model_name):
        message = f"model {shown(name)} is not here; this server has {shown(model_name)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    n = _number(data, "n", 1, 1, limits.choices, True)
    prompts = _prompts(data, encoder, limits, n)
    stop = _texts(data, "stop")
    if len(stop) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_LENGTH for text in stop):
        raise ApiError(400, f"stop: expected up to {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters", param="stop")
    request = Request(
        prompts,
        max_tokens=_number(data, "max_tokens", min(16, limits.max_tokens), 0, limits.max_tokens, True),
        temperature=_number(data, "temperature", 1.0, 0, 100, False),
        top_p=_number(data, "top_p", 1.0, 1e-6, 1, False),
        top_k=_number(data, "top_k", 0, 0, 2**31, True),
        n=n,
        seed=_number(data, "seed", None, 0, 2**63 - 1, True),
        stop=stop,
        echo=_flag(data, "echo"),
        stream=_flag(data, "stream"),
    )
    options = data.pop("stream_options", None)
    if options is not None:
        if not isinstance(options, dict) or not request.stream:
            raise ApiError(400, "stream_options: expected an object, and stream with it", param="stream_options")
        request.include_usage = _flag(options, "include_usage")
        data |= {f"stream_options.{name}": value for name, value in options.items()}
    if not isinstance(data.pop("user", None), str | None):
        raise ApiError(400, "user: expected a string", param="user")
    for name, value in data.items():
        if name not in NEUTRAL:
            known = {*(f.name for f in fields(Request)), *NEUTRAL, "model", "prompt", "user", "stream_options"} - {
                "prompts",
                "include_usage",
            }
            close = difflib.get_close_matches(name[:60], known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ApiError(400, f"unknown field {shown(name)}{hint}", param=shown(name)[1:-1])
        if value not in NEUTRAL[name]:
            raise ApiError(400, f"{name} is not supported by this server", param=name)
    return request


def answer(model: GPT, encoder: Tokenizer, request: Request) -> Iterator[list[Piece]]:
    """Draws what was asked for, one prompt after the other, the n choices of each in one batch.

    A seed begins with each prompt anew: the same text as `nanogpt.sample` writes with that seed, the same options,
    num_samples=n, and stop=<|endoftext|> where the tokenizer has that token.

    Yields:
        After each step what is new, often nothing: a caller that gives up needs to wait for one step only.
    """
    generator = torch.Generator(model.lm_head.weight.device)
    generator.manual_seed(secrets.randbits(63))
    sampling = {"temperature": request.temperature, "top_k": request.top_k, "top_p": request.top_p}
    for first, prompt in zip(range(0, len(request.prompts) * request.n, request.n), request.prompts):
        rows = [Text(encoder, request.stop, encoder.eot) for _ in range(request.n)]
        if request.echo:
            yield [Piece(first + i, encoder.decode(prompt)) for i in range(request.n)]
        if request.seed is not None:
            generator.manual_seed(request.seed)
        steps = write(model, encoder, prompt, rows, request.max_tokens, generator=generator, **sampling)
        running = set(range(request.n))
        with closing(steps):
            for texts in steps:
                ended = {i for i in running if rows[i].ended}
                yield [
                    Piece(first + i, texts[i], "stop" if i in ended else None, len(rows[i].tokens))
                    for i in sorted(running)
                    if texts[i] or i in ended
                ]
                running -= ended
        yield [Piece(first + i, "", "length", len(rows[i].tokens)) for i in sorted(running)]

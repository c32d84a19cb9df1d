"""A model behind OpenAI's completions API, and a page to try it: ``python -m nanogpt.serve --out_dir=out``.

completions.py: what a request may say, and its answer; guard.py: who may ask, slow clients; api.py: the application.
"""

from dataclasses import dataclass

from nanogpt.config import key
from nanogpt.sample import LoadConfig


@dataclass
class ServeConfig(LoadConfig):
    """What is served, to whom, and how much of it."""

    host: str = key("127.0.0.1", "address to listen on; 0.0.0.0: every network this machine is on", "Server")
    port: int = key(8000, "its port (0: any free one)")
    api_key_file: str = key("", "file with a key that requests must bear (empty: none)")

    max_body: int = key(262144, "bytes of a request", "Limits")
    max_prompt_tokens: int = key(0, "tokens of a prompt (0: the model's block_size)")
    max_tokens: int = key(2048, "tokens that a request may ask for")
    max_choices: int = key(16, "completions that a request may ask for: prompts times n")
    max_queue: int = key(8, "requests that wait while one is answered; more are told to try later")
    max_connections: int = key(64, "clients at a time")
    client_timeout: float = key(20.0, "seconds a client has to send a request, or to take what was sent to it")
    shutdown_timeout: float = key(10.0, "seconds that answers may still take after SIGTERM")

    def check(self) -> None:
        super().check()
        for name, holds in (
            ("host", self.host),
            ("port", 0 <= self.port < 65536),
            ("max_body", self.max_body >= 1),
            ("max_prompt_tokens", self.max_prompt_tokens >= 0),
            ("max_tokens", self.max_tokens >= 1),
            ("max_choices", self.max_choices >= 1),
            ("max_queue", self.max_queue >= 0),
            ("max_connections", self.max_connections >= 1),
            ("client_timeout", self.client_timeout > 0),
            ("shutdown_timeout", self.shutdown_timeout >= 0),
        ):
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)}: out of range")

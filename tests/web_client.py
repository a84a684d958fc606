"""A page that is served in this process on a real port, and a client that says exactly what it is told to."""

from __future__ import annotations

import io
import json
import os
import socket
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import requests

from chiasm.prediction.folders import Predictor
from chiasm.serving.server import answering
from chiasm.serving.web_limits import Page
from dicom_patients import write_source
from synthetic_cohort import SHAPE, affine, pair, save

FORMATS = {".nii.gz", ".nii", ".mha", ".nrrd", ".mgz"}
UNKNOWN = "A" * 22  # the id of no job


@dataclass
class Client:
    """Whoever uses the API of a page."""

    port: int
    folder: Path
    log: list[str]
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, **more: Any) -> requests.Response:
        more["headers"] = {**self.headers, **more.get("headers", {})}
        return requests.request(method, self.root + path, timeout=60, **more)

    def hand_in(self, files: Mapping[str, Path | tuple[str, bytes]], series: tuple[str, ...] = ()) -> requests.Response:
        parts = [(name, (one.name, one.read_bytes()) if isinstance(one, Path) else one) for name, one in files.items()]
        return self.ask("POST", "/api/jobs", files=parts, data=[("series", rule) for rule in series])

    def finish(self, answer: requests.Response, seconds: float = 120) -> dict[str, Any]:
        """Wait until the job of an answer is done or has failed."""
        assert answer.status_code == 202, answer.text
        last = time.monotonic() + seconds
        while time.monotonic() < last:
            job: dict[str, Any] = self.ask("GET", f"/api/jobs/{answer.json()['id']}").json()
            if job["state"] in ("done", "failed"):
                return job
            time.sleep(0.02)
        raise AssertionError(f"the job took more than {seconds} s")

    def raw(self, content: bytes, seconds: float = 60) -> bytes:
        """Send bytes as they are, and read until the server hangs up."""
        with socket.create_connection(("127.0.0.1", self.port), seconds) as line:
            line.sendall(content)
            return read_all(line)

    def stored(self) -> list[Path]:
        """Whatever the server keeps of scans."""
        places = os.walk(self.folder)  # which passes over a folder that vanishes meanwhile
        return sorted(Path(place, name) for place, _, names in places for name in names)


def read_all(line: socket.socket) -> bytes:
    received = b""
    try:
        while piece := line.recv(65536):
            received += piece
    except ConnectionResetError:
        pass  # it hung up on what was not read
    return received


@contextmanager
def served(predictor: Predictor, folder: Path, page: Page, turn: Lock | None = None) -> Iterator[Client]:
    """Serve a page on a free port until the block ends."""
    log: list[str] = []
    with answering(predictor, page, folder, turn or Lock(), log.append) as running:
        headers = {"Authorization": f"Bearer {page.token}"} if page.token else {}
        yield Client(running.port, folder, log, headers)


def problem(answer: requests.Response) -> dict[str, str]:
    """The refusal in an answer, which must be whole: one sentence, what to do, a code; never a traceback."""
    content = answer.json()
    assert answer.headers["content-type"] == "application/json"
    assert set(content) == {"message", "hint", "reason"} and content["message"].endswith(".")
    assert "Traceback" not in answer.text and "/tmp" not in answer.text and 'File "' not in answer.text
    return content  # type: ignore[no-any-return]


def write_scan(folder: Path, seed: int = 1, name: str = "scan.nii.gz") -> Path:
    return save(folder / name, pair(seed, 5.0, SHAPE)[0], affine())


def write_archive(path: Path, folders: Mapping[str, Mapping[str, object]]) -> Path:
    """A zip archive of one DICOM series for each folder, with what its headers say."""
    with zipfile.ZipFile(path, "w") as archive:
        for seed, (name, says) in enumerate(folders.items(), 1):
            image = np.rint(pair(seed, 5.0, SHAPE)[0]).astype(np.int16)
            place = path.with_suffix("") / name
            for file in write_source(place, image, spacing=(1.0, 1.0, 3.0), **says):  # type: ignore[arg-type]
                archive.write(file, f"{name}/{file.name}")
    return path


def zipped(members: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return content.getvalue()


def body_of(fields: Mapping[str, tuple[str, bytes]], boundary: str = "edge") -> bytes:
    """A form as it goes over the line, with names of files that no client would send."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{file}"\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for name, (file, content) in fields.items()
    ]
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


def head_of(body: bytes | int, boundary: str = "edge", more: str = "") -> bytes:
    """The head of a request that hands in a form."""
    length = body if isinstance(body, int) else len(body)
    return (
        f"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary={boundary}\r\n"
        f"Content-Length: {length}\r\nConnection: close\r\n{more}\r\n"
    ).encode()


def answer_in(received: bytes) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer that was read from the line."""
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)

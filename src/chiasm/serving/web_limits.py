"""Where the page and its REST API listen, who may use them, and their limits."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from chiasm.errors import RecipeError

TOKEN = "CHIASM_TOKEN"  # the environment variable that may hold the token
SHORTEST_TOKEN = 16  # characters
LONGEST_TOKEN_FILE = 4096  # bytes

MIB = 2**20
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
WILDCARDS = ("0.0.0.0", "::")


class WebLimits(NamedTuple):
    """The limits of the page and its API.

    Attributes:
        body_bytes: Of a request.
        waiting: Jobs that wait for their turn, those whose files are still coming among them.
        finished: Jobs that are done and whose files are kept.
        stored_bytes: Of all files of all jobs; a new job is refused while they are more.
        keep_s: Seconds for which the files of a finished job are kept.
        head_s: Seconds within which the head of a request must have come.
        body_s: Seconds within which its body must have come.
        idle_s: Seconds that a body may pause, or that a client may take nothing of an answer.
        connections: At a time.
    """

    body_bytes: int = 2048 * MIB
    waiting: int = 32
    finished: int = 256
    stored_bytes: int = 16384 * MIB
    keep_s: float = 3600.0
    head_s: float = 10.0
    body_s: float = 600.0
    idle_s: float = 30.0
    connections: int = 256


@dataclass(frozen=True)
class Page:
    """Where the page and the API listen, and who may use them.

    Attributes:
        port: Of TCP; 0 takes any that is free.
        host: Address to listen on.
        token: What a request must present; everybody may where it is empty, which only a loopback address may have.
        names: Other names that browsers may call the server by, such as that of a proxy before it.
        limits: What it takes at most.
        dicomweb: Rules that choose the series of studies that come by DICOMweb; None if it is not spoken.
    """

    port: int
    host: str = "127.0.0.1"
    token: str = field(default="", repr=False)
    names: Sequence[str] = ()
    limits: WebLimits = field(default_factory=WebLimits)
    dicomweb: Sequence[str] | None = None

    def check(self) -> None:
        """Refuse a page that would be open to the network.

        Raises:
            RecipeError: If it is, or its token is too short.
        """
        if not self.token and not is_loopback(self.host):
            raise RecipeError(
                "a page that others can reach needs a token",
                reason="open",
                found=self.host,
                hint=f"Put one into a file and give it with --token-file, or set {TOKEN}; or leave --host out.",
            )
        if self.token and not re.fullmatch(rf"[!-~]{{{SHORTEST_TOKEN},}}", self.token):
            raise RecipeError(
                "the token is too short or holds spaces or letters beyond ASCII",
                reason="token",
                expected=f"at least {SHORTEST_TOKEN} letters, digits and signs",
                hint="openssl rand -hex 16 makes one.",
            )

    def knows(self, name: str) -> bool:
        """Return whether a browser may call the server by a name; another name may come from a hostile page."""
        known = {*LOOPBACK_NAMES, self.host, *self.names}
        if self.host in WILDCARDS:
            known.add(socket.gethostname())
        lower = name.lower().strip("[]").rstrip(".")
        return lower in {one.lower().strip("[]") for one in known} or (self.host in WILDCARDS and _is_address(lower))


def read_token(path: Path | None) -> str:
    """Read the token from the first line of a file, or else from the environment; empty if there is none.

    Raises:
        RecipeError: If the file cannot be read, or holds none.
    """
    if path is None:
        return os.environ.get(TOKEN, "").strip()
    try:
        with path.open("rb") as file:
            lines = file.read(LONGEST_TOKEN_FILE).decode().split()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("the token cannot be read", path=path, reason="token", found=error) from error
    if len(lines) != 1:
        raise RecipeError("is no file of a token", path=path, reason="token", expected="one word in one line")
    return lines[0]


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on can be reached only from this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

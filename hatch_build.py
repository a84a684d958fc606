"""Bring NiiVue, the viewer of the case pages, from npm when chiasm is built or installed for development.

The lock file says where it is and what it must be; no node is needed.
Without a network the build goes on: the case pages then show still slices
and say how to get the panes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MEMBER = "package/dist/niivue.umd.js"
SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"  # of that member, in 0.69.0
PLACE = Path("src/chiasm/reports/static/niivue.umd.js")
SECONDS = 60


class NiiVueHook(BuildHookInterface[Any]):
    """Puts the viewer's script where the package looks for it."""

    PLUGIN_NAME = "niivue"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002  hatchling's signature
        """Fetch the script unless it is there; a network that fails is told, and no error."""
        script = Path(self.root) / PLACE
        try:
            bring(Path(self.root) / "package-lock.json", script)
        except OSError as error:  # urllib's errors are OSErrors
            self.app.display_warning(f"NiiVue was not fetched ({error}); case pages will show still slices only")
        if script.exists():
            build_data["artifacts"].append(f"/{PLACE.as_posix()}")


def bring(lock: Path, script: Path) -> None:
    """Fetch the archive that the lock file names, check it, and write its script, whole or not at all.

    Raises:
        OSError: If it cannot be fetched.
        ValueError: If the archive or the script is not what was pinned.
    """
    if script.exists() and hashlib.sha256(script.read_bytes()).hexdigest() == SHA256:
        return
    pinned = json.loads(lock.read_text(encoding="utf-8"))["packages"]["node_modules/@niivue/niivue"]
    with urllib.request.urlopen(pinned["resolved"], timeout=SECONDS) as answer:
        archive = answer.read()
    algorithm, _, expected = pinned["integrity"].partition("-")
    if hashlib.new(algorithm, archive).digest() != base64.b64decode(expected):
        raise ValueError(f"{pinned['resolved']} is not what package-lock.json pins")
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        member = packed.extractfile(MEMBER)
        content = b"" if member is None else member.read()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(f"{MEMBER} is not the script that was looked at; look again, then change SHA256")
    script.parent.mkdir(parents=True, exist_ok=True)
    partial = script.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(script)

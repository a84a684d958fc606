"""DICOM files sent to another node by C-STORE."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chiasm.errors import ChiasmError, RecipeError

RESULTS = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.30")
PLAIN = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")


SUCCESS, OUT_OF_RESOURCES, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xC000


SEND_S = 30.0  # that another node may take to answer


ATTEMPTS, PAUSE_S = 3, 2.0  # of sending


@dataclass(frozen=True)
class Peer:
    """Another node.

    Attributes:
        title: Its AE title.
        host: Name or address.
        port: Of TCP.
    """

    title: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.title}@{self.host}:{self.port}"


def parse_peer(text: str) -> Peer:
    """Parse the address of another node.

    >>> parse_peer("ORTHANC@127.0.0.1:4242")
    Peer(title='ORTHANC', host='127.0.0.1', port=4242)

    Raises:
        RecipeError: If it does not have the form AET@host:port.
    """
    title, _, place = text.partition("@")
    host, _, port = place.rpartition(":")
    if not host or not re.fullmatch(r"\d{1,5}", port) or not 0 < int(port) < 2**16:
        raise RecipeError("the destination has a wrong form", reason="peer", found=text, expected="AET@host:port")
    return Peer(check_title(title), host.strip("[]"), int(port))


def check_title(title: str) -> str:
    r"""Return an AE title: 1 to 16 printable ASCII characters, no backslash.

    Raises:
        RecipeError: If it is not a title.
    """
    if not re.fullmatch(r"[ -\[\]-~]{1,16}", title) or title != title.strip():
        raise RecipeError("is no AE title", reason="title", found=repr(title), expected="1 to 16 characters")
    return title


def send(files: Sequence[Path], peer: Peer, title: str) -> None:
    """Send DICOM files to another node, all of them, in up to three attempts.

    Args:
        files: Files of `write_dicom_case`.
        peer: The other node.
        title: AE title of this node.

    Raises:
        ChiasmError: If some could not be sent.
    """
    left = list(files)
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_S)
        left = _send_once(left, peer, title)
        if not left:
            return
    raise ChiasmError(f"{len(left)} of {len(files)} objects could not be sent to {peer}", reason="not-sent")


def _send_once(files: Sequence[Path], peer: Peer, title: str) -> list[Path]:
    """Send files, and return those that were not accepted."""
    from pynetdicom import AE

    sender = AE(ae_title=title)
    sender.connection_timeout = sender.acse_timeout = sender.network_timeout = sender.dimse_timeout = SEND_S
    for kind in RESULTS:
        sender.add_requested_context(kind, list(PLAIN))
    association = sender.associate(peer.host, peer.port, ae_title=peer.title)
    left = list(files)
    if not association.is_established:
        return left
    try:
        for path in files:
            status = association.send_c_store(path)
            if "Status" in status and (status.Status == SUCCESS or status.Status >> 12 == 0xB):  # a warning is taken
                left.remove(path)
    except (ValueError, RuntimeError):  # a kind that the other does not take, or an association that ended
        pass
    finally:
        if association.is_established:
            association.release()
    return left

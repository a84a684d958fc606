"""A gate where connections to a DICOM node wait until they have requested an association.

pynetdicom gives each open connection two threads and one of its few associations, even if the connection requests
nothing.  Here one thread watches all connections: a connection that stays silent, or sends its request a byte at a
time, costs only a socket and is closed after a few seconds.

Reference: DICOM PS3.8, 9.2 (states 1 and 2, ARTIM timer) and 9.3 (PDUs).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

REQUEST = 1  # type of the PDU A-ASSOCIATE-RQ
HEAD = 6  # bytes of a PDU that hold its type and length
LONGEST_PDU = 2**20  # bytes
ENOUGH = 2**15  # bytes of a long request that must have come; systems hold some 64 KiB of what nobody reads
ABORT = b"\x07\0\0\0\0\x04\0\0\x02\x02"  # A-ABORT by the provider: unexpected PDU

Standing = Literal["waits", "asks", "wrong", "gone"]


class Visitor(NamedTuple):
    """An open connection.

    Attributes:
        connection: Its socket.
        address: Of the other end, as `socket.accept` returns it.
        since: When it was opened, on the gate's clock.
    """

    connection: socket.socket
    address: Any
    since: float


class Look(NamedTuple):
    """The result of a look at all waiting connections.

    Attributes:
        ready: Connections with a complete request, the oldest first.
        silent: Number of connections that were closed because they sent no complete request in time.
        asking: Number of connections with a complete request that wait for a place.
    """

    ready: tuple[Visitor, ...]
    silent: int
    asking: int = 0


class Gate:
    """Connections that have not requested an association yet; for one thread.

    Args:
        request_s: Seconds within which a request must be complete.
        most: Connections that wait at a time; for one more, the oldest is closed.
        clock: Seconds, rising.
    """

    def __init__(self, request_s: float, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._request_s, self._most, self._clock = request_s, most, clock
        self._waiting: list[Visitor] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def admit(self, connection: socket.socket, address: Any) -> None:
        """Let a connection wait; it does not block from now on."""
        connection.setblocking(False)
        self._waiting.append(Visitor(connection, address, self._clock()))
        while len(self._waiting) > self._most:
            close_politely(self._waiting.pop(0).connection)

    def look(self, places: int) -> Look:
        """Return connections with a complete request, and close those that are silent, gone or not DICOM.

        Args:
            places: Number of free associations.  Without one, a request waits as long as a silent connection may.  Then
            it is returned too, so that it is refused in the way of DICOM.
        """
        now, silent, asking = self._clock(), 0, 0
        ready: list[Visitor] = []
        waiting, self._waiting = self._waiting, []
        for visitor in waiting:
            standing, late = standing_of(visitor.connection), now - visitor.since > self._request_s
            if standing == "asks" and (late or len(ready) < places):
                ready.append(visitor)
            elif standing in ("wrong", "gone") or late:
                silent += standing == "waits"
                close_politely(visitor.connection, ABORT if standing == "wrong" else b"")
            else:
                asking += standing == "asks"
                self._waiting.append(visitor)
        return Look(tuple(ready), silent, asking)

    def close(self) -> None:
        """Close all that wait."""
        while self._waiting:
            close_politely(self._waiting.pop().connection)


class Places:
    """The places for associations of a node; the association that was silent for longest gives up its place.

    Args:
        count: Associations at a time.
        silent_s: Seconds of silence from which one may be ended for another.
        clock: Seconds, rising.
    """

    def __init__(self, count: int, silent_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._count, self._silent_s, self._clock = count, silent_s, clock
        self._heard: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
        self._ending: WeakSet[Any] = WeakSet()

    def hear(self, association: Any) -> None:
        """Note that an association said something just now; may be called by its own thread."""
        self._heard[association] = self._clock()

    def free(self, active: Collection[Any]) -> int:
        """Count the free places.

        Args:
            active: All associations that there are.
        """
        return self._count - len(active)

    def make_room(self, active: Collection[Any], count: int) -> list[Any]:
        """End associations for others that wait, the longest silent first; ending takes a moment.

        Args:
            active: All associations that there are.
            count: How many others wait.

        Returns:
            The associations that are ended now; each one that was ended before and is still there also makes a place.
        """
        last = self._clock() - self._silent_s
        count -= sum(association in self._ending for association in active)
        times = {one: self._heard.get(one, last) for one in active if one not in self._ending}
        silent = sorted((one for one in times if times[one] < last), key=lambda one: times[one])[: max(0, count)]
        for association in silent:
            self._ending.add(association)
            end_association(association)
        return silent


def end_association(association: Any) -> None:
    """Let an association of pynetdicom end itself; an established one informs the other end."""
    if association.is_established:
        association.abort(block=False)
    else:
        association.dul.to_user_queue.put(None)  # what it waits for: no request


def standing_of(connection: socket.socket) -> Standing:
    """Classify what a connection has sent so far, without reading it.

    Args:
        connection: A socket that is not blocking.

    Returns:
        "asks" once a request for an association is there, "waits" before,
        "wrong" for anything else, "gone" where the other end closed it or
        promises more than a request can hold.
    """
    try:
        sent = connection.recv(ENOUGH, socket.MSG_PEEK)
    except BlockingIOError:
        return "waits"
    except OSError:
        return "gone"
    if not sent:
        return "gone"
    if sent[0] != REQUEST:
        return "wrong"
    if len(sent) < HEAD:
        return "waits"
    length = int.from_bytes(sent[2:HEAD], "big")
    if length > LONGEST_PDU:
        return "gone"
    return "asks" if len(sent) >= min(HEAD + length, ENOUGH) else "waits"


def close_politely(connection: socket.socket, last: bytes = b"") -> None:
    """Close a connection after a last message; read what it sent first, or the other end would see an error."""
    with suppress(OSError):
        connection.setblocking(False)
        connection.send(last)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(ENOUGH)
    connection.close()


def read_within(connection: socket.socket, count: int, seconds: float) -> bytearray:
    """Read `count` bytes, or fewer if the other end closes first.

    Args:
        connection: A socket; its timeout is changed.
        count: Of bytes.
        seconds: For all of them together, not for each piece.

    Raises:
        TimeoutError: If they have not come by then.
        OSError: If the connection breaks.
    """
    content = bytearray()
    last = time.monotonic() + seconds
    while len(content) < count:
        left = last - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        piece = connection.recv(min(ENOUGH, count - len(content)))
        if not piece:
            break
        content += piece
    return content

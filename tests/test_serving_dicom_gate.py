"""The gate of a DICOM node: silent connections cost nobody else anything, and an idle association ends."""

from __future__ import annotations

import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chiasm.serving.dicom_gate import Gate, Places, read_within
from dicom_patients import scan, write_source

pytest.importorskip("pynetdicom", reason="pynetdicom is not installed (pip install 'chiasm[dicom]')")

REQUEST_S, IDLE_S, SILENT_S = 1.5, 3.0, 0.3
NEVER_S = 600  # no test lasts as long: what a node does earlier, it does for another reason
WAIT_S = 60  # for what comes at once, on however busy a machine

SCRIPT = """
import sys
from pathlib import Path
from threading import Lock, Thread
from chiasm.prediction.folders import load
from chiasm.serving.dicom_inbox import Limits
from chiasm.serving.dicom_node import Node, run_node
from chiasm.serving.stop import until_stopped

def run(name, **seconds):
    place = Path(sys.argv[2], name)
    (place / "spool").mkdir(parents=True)
    limits = Limits(**dict(request_s={never}, idle_s={never}, silent_s={never}, associations=2) | seconds)
    node = Node(0, out=place / "out", limits=limits)
    run_node(predictor, node, place / "spool", Lock(), stop, lambda line: print(f"{{name}}: {{line}}", flush=True))

predictor = load(Path(sys.argv[1]))
with until_stopped() as stop:
    for name, seconds in dict(
        REQUEST=dict(request_s={request}), IDLE=dict(idle_s={idle}), SILENT=dict(silent_s={silent})
    ).items():
        Thread(target=run, args=[name], kwargs=seconds).start()
    stop.asked.wait()
"""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def connect(port: int) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port))
    made.settimeout(WAIT_S)
    return made


def read_to_the_end(connection: socket.socket) -> None:
    """Wait until the other end closes."""
    while connection.recv(1000):
        pass


def is_open(connection: socket.socket) -> bool:
    """Whether the other end has neither closed nor said anything."""
    connection.setblocking(False)
    try:
        connection.recv(1)
        return False
    except BlockingIOError:
        return True


def associate(port: int) -> Any:
    from pynetdicom import AE

    caller = AE(ae_title="SENDER")
    caller.add_requested_context("1.2.840.10008.1.1")
    caller.add_requested_context("1.2.840.10008.5.1.4.1.1.4")
    caller.acse_timeout = caller.dimse_timeout = WAIT_S
    caller.network_timeout = NEVER_S  # the node ends associations, not their caller
    return caller.associate("127.0.0.1", port, ae_title="CHIASM")


def echo(port: int) -> None:
    """Associate, ask for an echo, and release."""
    association = associate(port)
    assert association.is_established
    assert association.send_c_echo().Status == 0
    association.release()


def request_bytes() -> bytes:
    """A request for an association as pynetdicom sends it."""
    with socket.socket() as ear:
        ear.bind(("127.0.0.1", 0))
        ear.listen()
        caller = threading.Thread(target=associate, args=(ear.getsockname()[1],))
        caller.start()
        other, _ = ear.accept()
        with other:
            head = read_within(other, 6, 5)
            content = head + read_within(other, struct.unpack(">BBL", head)[2], 5)
            other.sendall(b"\x07\0\0\0\0\x04\0\0\0\0")
        caller.join()
    return bytes(content)


# --- the gate alone ----------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        far.settimeout(5)
        yield near, far


def test_a_request_gets_through_when_its_last_byte_has_come(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    clock = Clock()
    gate = Gate(5, 10, clock)
    gate.admit(near, "there")
    request = struct.pack(">BBL", 1, 0, 300) + bytes(300)
    for sent in (request[:1], request[1:7], request[7:-1]):
        far.sendall(sent)
        clock.now += 1
        assert gate.look(1) == ((), 0, 0) and len(gate) == 1
    far.sendall(request[-1:])
    assert gate.look(0) == ((), 0, 1)  # no place yet
    (visitor,), silent, _ = gate.look(1)
    assert (visitor.address, silent, len(gate)) == ("there", 0, 0)
    assert read_within(near, len(request), 1) == request  # nothing was taken


def test_bytes_one_at_a_time_do_not_buy_time(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    clock = Clock()
    gate = Gate(5, 10, clock)
    gate.admit(near, None)
    for byte in struct.pack(">BBL", 1, 0, 100):
        assert gate.look(1) == ((), 0, 0)
        far.sendall(bytes([byte]))
        clock.now += 0.9
    assert gate.look(1) == ((), 1, 0)
    assert far.recv(10) == b""


def test_a_request_for_which_there_is_no_place_is_passed_on_in_the_end(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    clock = Clock()
    gate = Gate(5, 10, clock)
    gate.admit(near, None)
    far.sendall(struct.pack(">BBL", 1, 0, 4) + bytes(4))
    assert gate.look(0).ready == ()
    clock.now = 6
    assert len(gate.look(0).ready) == 1


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n", b"\x04\0\0\0\0\x10", b"\x16\x03\x01"])
def test_what_is_no_request_is_answered_and_closed(sent: bytes, pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    gate = Gate(5, 10, Clock())
    gate.admit(near, None)
    far.sendall(sent)
    assert gate.look(1) == ((), 0, 0) and len(gate) == 0
    assert far.recv(100) == b"\x07\0\0\0\0\x04\0\0\x02\x02"  # A-ABORT
    assert far.recv(100) == b""


def test_a_request_that_promises_too_much_is_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    gate = Gate(5, 10, Clock())
    gate.admit(near, None)
    far.sendall(struct.pack(">BBL", 1, 0, 2**31))
    assert gate.look(1) == ((), 0, 0) and len(gate) == 0
    assert far.recv(100) == b""


def test_the_oldest_goes_when_too_many_wait() -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    gate = Gate(5, 2, Clock())
    for near, far in pairs:
        far.settimeout(5)
        gate.admit(near, None)
    assert len(gate) == 2 and pairs[0][1].recv(1) == b""
    gate.close()
    assert [far.recv(1) for _, far in pairs[1:]] == [b"", b""]
    for near, far in pairs:
        near.close(), far.close()


def test_reading_ends_in_time_however_the_bytes_come(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    far.sendall(b"abc")
    with pytest.raises(TimeoutError):
        read_within(near, 4, 0.05)
    far.sendall(b"defgh")
    assert read_within(near, 4, 1) == b"defg"
    far.shutdown(socket.SHUT_WR)
    assert read_within(near, 4, 1) == b"h"


class Fake:
    """An association that notes how it was ended."""

    def __init__(self, established: bool = True) -> None:
        self.is_established, self.ended = established, ""
        self.dul = SimpleNamespace(to_user_queue=SimpleNamespace(put=lambda _: self.end("unheard")))

    def end(self, how: str) -> None:
        self.ended = how

    def abort(self, block: bool) -> None:
        self.end("aborted" if not block else "")


def test_places_are_given_up_by_who_was_silent_for_longest_and_once_for_each_that_waits() -> None:
    clock = Clock()
    places = Places(3, 1.0, clock)
    active = [Fake(), Fake(established=False), Fake()]
    for association in active:
        clock.now += 1
        places.hear(association)
    assert places.free(active) == 0 and places.free(active[:1]) == 2
    clock.now = 3.9  # silent for 2.9, 1.9 and 0.9 s
    assert places.make_room(active, 0) == []
    assert places.make_room(active, 1) == active[:1]
    assert places.make_room(active, 1) == []  # the first is about to leave
    assert places.make_room(active, 3) == active[1:2]
    assert [one.ended for one in active] == ["aborted", "unheard", ""]
    places.hear(active[2])
    clock.now = 4.5
    assert places.make_room(active[2:], 1) == []


# --- the gate of a node ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nodes:
    """Three nodes of two associations each: one is hasty with requests, one with the idle, and one with the silent.

    Attributes:
        request: Port of the node that waits `REQUEST_S` for a request, and for all else `NEVER_S`.
        idle: Port of the node that ends an association after `IDLE_S`.
        silent: Port of the node that ends one after `SILENT_S` where another waits.
        log: What they say.
    """

    request: int
    idle: int
    silent: int
    log: Path


def found_in(log: Path, pattern: str, process: subprocess.Popen[bytes] | None = None) -> str:
    """Wait until a log holds a pattern; return its first group."""
    last = time.monotonic() + 2 * WAIT_S
    while (found := re.search(pattern, text := log.read_text())) is None:
        assert time.monotonic() < last and (process is None or process.poll() is None), text
        time.sleep(0.05)
    return found[1]


@pytest.fixture(scope="module")
def nodes(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("gate")
    script = SCRIPT.format(request=REQUEST_S, idle=IDLE_S, silent=SILENT_S, never=NEVER_S)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", script, str(finished_run), str(folder)], stdout=log)
    try:
        names = ("REQUEST", "IDLE", "SILENT")
        ports = [
            int(found_in(folder / "log", rf"{name}: CHIASM listens on 127\.0\.0\.1:(\d+)", process)) for name in names
        ]
        yield Nodes(*ports, folder / "log")
    finally:
        process.terminate()
        try:
            process.wait(WAIT_S)
        finally:
            process.kill()
    assert process.returncode == 0


def test_forty_silent_connections_do_not_keep_a_sender_waiting(nodes: Nodes) -> None:
    silent = [connect(nodes.silent) for _ in range(40)]
    echo(nodes.silent)
    assert all(is_open(connection) for connection in silent)
    for connection in silent:
        connection.close()


def test_silent_connections_are_closed_in_time_and_not_before(nodes: Nodes) -> None:
    began = time.monotonic()
    silent = [connect(nodes.request) for _ in range(3)]
    for connection in silent:
        read_to_the_end(connection)
        assert time.monotonic() - began >= REQUEST_S
        connection.close()
    assert found_in(nodes.log, rf"(asked for nothing within {REQUEST_S:g} s) were closed: [1-3]")


def test_a_request_that_comes_byte_by_byte_is_silence(nodes: Nodes) -> None:
    request, began = request_bytes(), time.monotonic()
    with connect(nodes.request) as slow, pytest.raises(OSError):  # the node closed it
        for byte in request:
            slow.sendall(bytes([byte]))
            time.sleep(0.05)
    assert time.monotonic() - began >= REQUEST_S


def test_a_connection_that_says_anything_else_is_closed_at_once(nodes: Nodes) -> None:
    with connect(nodes.silent) as garbage:
        garbage.sendall(b"anything else")
        read_to_the_end(garbage)


def test_the_longest_silent_association_ends_for_one_that_waits(nodes: Nodes) -> None:
    first, second = associate(nodes.silent), associate(nodes.silent)  # both places
    began = time.monotonic()
    while time.monotonic() - began < 2 * SILENT_S:
        assert second.send_c_echo().Status == 0
    echo(nodes.silent)
    first.join(WAIT_S)
    assert first.is_aborted
    assert second.is_established and second.send_c_echo().Status == 0
    second.release()


def test_associations_that_speak_keep_their_places_and_another_is_refused_for_the_moment(nodes: Nodes) -> None:
    speaking = [associate(nodes.request) for _ in range(2)]
    late: list[Any] = []
    caller = threading.Thread(target=lambda: late.append(associate(nodes.request)))
    caller.start()
    while caller.is_alive():
        assert [one.send_c_echo().Status for one in speaking] == [0, 0]
    assert late[0].is_rejected
    for one in speaking:
        one.release()


def test_an_association_that_is_silent_ends_though_nobody_waits(nodes: Nodes) -> None:
    began = time.monotonic()
    idle = associate(nodes.idle)
    idle.join(WAIT_S)
    assert idle.is_aborted
    assert time.monotonic() - began > IDLE_S / 2
    assert found_in(nodes.log, "an association with (SENDER) was silent for too long")


@pytest.mark.parametrize("size", [300, 40_000])
def test_a_complete_request_of_garbage_takes_no_place(nodes: Nodes, size: int) -> None:
    garbage = [connect(nodes.silent) for _ in range(10)]
    for number, connection in enumerate(garbage):
        content = random.Random(number).randbytes(size)
        connection.sendall(struct.pack(">BBL", 1, 0, size) + content)
    echo(nodes.silent)
    for connection in garbage:
        connection.close()


def test_a_request_of_another_protocol_takes_no_place(nodes: Nodes) -> None:
    request = bytearray(request_bytes())
    request[7] = 2  # version
    others = [connect(nodes.silent) for _ in range(4)]
    for connection in others:
        connection.sendall(request)
    echo(nodes.silent)
    for connection in others:
        assert connection.recv(1) == b"\x03"  # A-ASSOCIATE-RJ
        connection.close()


def test_an_association_in_the_middle_of_a_pdu_without_end_ends_too(nodes: Nodes) -> None:
    began = time.monotonic()
    with connect(nodes.idle) as slow:
        slow.sendall(request_bytes())
        assert slow.recv(1) == b"\x02"  # accepted
        slow.sendall(struct.pack(">BBL", 4, 0, 100_000))
        with pytest.raises(OSError):
            for _ in range(1000):
                slow.sendall(b"x")
                time.sleep(0.05)
    assert time.monotonic() - began > IDLE_S / 2
    echo(nodes.idle)


def test_an_association_that_speaks_now_and_then_stays(nodes: Nodes, tmp_path: Path) -> None:
    import pydicom

    (path,) = write_source(tmp_path / "one", scan((8, 8, 1)))
    association, began = associate(nodes.idle), time.monotonic()
    while time.monotonic() - began < 1.5 * IDLE_S:
        time.sleep(IDLE_S / 10)  # so a busy machine may hold it up for nine times as long
        assert association.send_c_echo().Status == 0
    assert association.send_c_store(pydicom.dcmread(path)).Status == 0
    association.release()
    assert association.is_released

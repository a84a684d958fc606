"""A DICOM node: it receives series by C-STORE, and sends synthetic series to an archive or writes them to a folder.

It answers C-ECHO, accepts MR and CT, and works on one series at a time.  The log names a series that cannot be used by
its number and the reason.  The log holds only numbers, times, reasons and titles, and no text of an image.

Titles are names, not passwords: every program that reaches the port can use any title.
"""

from __future__ import annotations

import logging
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from socketserver import TCPServer
from threading import Lock, Thread
from typing import Any
from weakref import WeakKeyDictionary

from chiasm.cohorts.dicom_modalities import header_modality
from chiasm.cohorts.dicom_patients import WARNINGS, marks_of
from chiasm.errors import ChiasmError, RecipeError, RunError, VolumeError
from chiasm.locks import locked
from chiasm.prediction.dicom_case import DicomCase, write_dicom_case
from chiasm.prediction.ensemble import name_of
from chiasm.prediction.folders import Predictor
from chiasm.serving.dicom_gate import LONGEST_PDU, Gate, Look, Places, Visitor, read_within
from chiasm.serving.dicom_inbox import Arrival, Inbox, InboxError, Limits
from chiasm.serving.dicom_send import (
    NOT_UNDERSTOOD,
    OUT_OF_RESOURCES,
    PLAIN,
    SUCCESS,
    Peer,
    check_title,
    parse_peer,
    send,
)
from chiasm.serving.stop import Stop
from chiasm.serving.web_limits import is_loopback
from chiasm.volumes import read_volume
from chiasm.volumes.dicom_choice import fitting, pick_series
from chiasm.volumes.dicom_files import FAULTS
from chiasm.volumes.dicom_series import Series

IMAGES = (
    "1.2.840.10008.5.1.4.1.1.2",  # CT
    "1.2.840.10008.5.1.4.1.1.2.1",  # enhanced CT
    "1.2.840.10008.5.1.4.1.1.2.2",  # converted enhanced CT
    "1.2.840.10008.5.1.4.1.1.4",  # MR
    "1.2.840.10008.5.1.4.1.1.4.1",  # enhanced MR
    "1.2.840.10008.5.1.4.1.1.4.4",  # converted enhanced MR
)
SYNTAXES = (
    *PLAIN,
    "1.2.840.10008.1.2.2",  # big endian
    "1.2.840.10008.1.2.5",  # RLE
    "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81",  # JPEG-LS
    "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203",  # HTJ2K
    "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70",  # JPEG lossless
)  # fmt: skip
VERIFICATION = "1.2.840.10008.1.1"

OFFERED_PDU = 2**17  # bytes; up to `LONGEST_PDU` are taken, for what comes before the offer is known
TICK_S = 0.2
LOOK_S = 0.02  # between two looks at the connections that wait
SWEEP_S = 0.5  # between two calls of pynetdicom's own housekeeping, which collects garbage at every sixtieth
LOOP_S = 0.005  # between two looks of pynetdicom at a connection on which nothing happens
BACKLOG = 128  # connections that the system holds until they are accepted


@dataclass(frozen=True)
class Node:
    """Where a node listens, which senders it accepts, and where results go.

    Attributes:
        port: Of TCP; 0 takes any that is free.
        host: Address to listen on.
        title: The AE title that senders must call.
        allow: AE titles that may send; empty for all, which needs a loopback address.
        send_to: The node to which results are sent, as AET@host:port.
        out: The folder in which results are kept, each in its own folder.
        series: Words of the descriptions of the series to take, or their modality; None for all.
        limits: How much it takes.
    """

    port: int
    host: str = "127.0.0.1"
    title: str = "CHIASM"
    allow: Sequence[str] = ()
    send_to: str | None = None
    out: Path | None = None
    series: str | None = None
    limits: Limits = field(default_factory=Limits)

    def check(self) -> Peer | None:
        """Return where results are sent to.

        Raises:
            RecipeError: If an option is wrong, or the node would be open to the network.
        """
        peer = None if self.send_to is None else parse_peer(self.send_to)
        if peer is None and self.out is None:
            raise RecipeError(
                "results would go nowhere", reason="no-destination", expected="a folder (-o) or --send-to AET@host:port"
            )
        if not self.allow and not is_loopback(self.host):
            raise RecipeError(
                "a node that others can reach needs a list of who may send",
                reason="open",
                found=self.host,
                hint="Name their AE titles with --allow, or leave --host out.",
            )
        return peer


def run_node(predictor: Predictor, node: Node, spool: Path, turn: Lock, stop: Stop, say: Callable[[str], None]) -> None:
    """Run a DICOM node until it is asked to stop; then end its associations and remove waiting series.

    Args:
        predictor: Of a model with one source, see `check_one_source`.
        node: Where it listens, whose images it takes, and where results go.
        spool: An empty folder for what comes in.
        turn: Held while a series is synthesised.
        stop: When to end.
        say: Called with each line of the log.

    Raises:
        RecipeError: As `Node.check`.
        RunError: If pynetdicom is not installed, or another process keeps results in the node's folder.
        ChiasmError: If the address cannot be listened on.
    """
    peer, kernel = node.check(), _kernel(node)
    inbox = Inbox(spool, node.limits)
    held = nullcontext() if node.out is None else locked(node.out)
    with held, _listening(kernel, node, inbox, say) as heard:
        say(f"{node.title} listens on {node.host}:{heard}")
        unfinished: list[Arrival] = []
        try:
            while not stop.asked.wait(TICK_S):
                unfinished = inbox.collect(lambda: kernel.active_associations)
                while unfinished:
                    if (arrival := unfinished[0]).whole:
                        with _at_work(stop, arrival.folder), turn:
                            _handle(arrival, predictor, node, peer, say)
                    else:
                        say(f"series {arrival.number}: broke off after {arrival.images} images, removed")
                    del unfinished[0]
        finally:
            for left in (*unfinished, *inbox.remaining()):
                say(f"series {left.number}: the node ended before it was done; send it again from {left.sender}")


def check_node(node: Node) -> None:
    """Refuse a node with wrong options or without pynetdicom, before a model is loaded.

    Raises:
        RecipeError: As `Node.check`.
        RunError: If pynetdicom is not installed.
    """
    node.check()
    _kernel(node)


def check_one_source(predictor: Predictor, run: Path) -> None:
    """Refuse a model of several sources, as a node cannot know which series are of one patient.

    Raises:
        RunError: If it is one.
    """
    sources = predictor.model.plan.sources
    if len(sources) > 1:
        raise RunError(
            "needs several series of one patient, which a node cannot match",
            path=run,
            reason="sources",
            found=", ".join(sources),
            hint="Use chiasm predict, or the page of chiasm serve --port, which takes a file for each.",
        )


# --- one series --------------------------------------------------------------------------------------------------


@contextmanager
def _at_work(stop: Stop, folder: Path) -> Iterator[None]:
    """Let a signal end the block at once, and remove the folder of its series after it."""
    stop.at_once = True
    try:
        yield
    finally:
        stop.at_once = False
        shutil.rmtree(folder, ignore_errors=True)


def _handle(arrival: Arrival, predictor: Predictor, node: Node, peer: Peer | None, say: Callable[[str], None]) -> None:
    """Synthesise one series, deliver the result, and log it."""
    name = f"series {arrival.number}"
    say(f"{name}: {arrival.images} images from {arrival.sender}")
    started = time.monotonic()
    place = (node.out or arrival.folder) / f"{datetime.now():%Y%m%d-%H%M%S}-{arrival.number}"
    try:
        case = synthesise_series(arrival.folder, place, predictor, node.series)
        where = f": {place}" if node.out else ""
        say(f"{name}: synthesised in {time.monotonic() - started:.1f} s{where}")
        for sentence in case.warnings:
            say(f"{name}: warning: {sentence}")
        if peer is not None:
            send(case.files, peer, node.title)
            say(f"{name}: {len(case.files)} objects sent to {peer}")
    except ChiasmError as error:  # without what was found, which an image may have said
        say(f"{name}: refused ({error.reason}): {error.what}")
    except FAULTS as error:
        say(f"{name}: failed ({type(error).__name__})")


def synthesise_series(folder: Path, place: Path, predictor: Predictor, wanted: str | None = None) -> DicomCase:
    """Synthesise the one series of a folder.

    Args:
        folder: Its images, of one series.
        place: Where the result will lie.
        predictor: Of a model with one source.
        wanted: Words of its description, or its modality; any where None.  Of a series with several
            kinds of images, such as magnitude and phase, the words choose one.

    Raises:
        VolumeError: If it is not what the model takes, synthetic itself, or cannot be read.
        ChiasmError: If the result cannot be written.
    """
    model = predictor.model
    series = _series_in(folder, wanted)
    _check_series(series, folder, model.plan.sources[0], wanted)
    made = predictor.predict(read_volume(folder, series=series.choice, reading=predictor.reading))
    warnings = (*(WARNINGS[mark] for mark in marks_of(series)), *made.warnings)
    return write_dicom_case(place, replace(made, warnings=warnings), [series], model, name_of(predictor.models))


def _check_series(series: Series, folder: Path, source: str, wanted: str | None) -> None:
    """Refuse a series that is synthetic, is of another modality, or does not fit the rule."""
    if series.synthetic:  # an archive that passes on what it gets would never end
        raise VolumeError("was made, not acquired", path=folder, reason="synthetic")
    if series.modality != header_modality(source):  # nobody chose it, so what may be anything is not taken
        raise VolumeError("is of another modality than the model takes", path=folder, reason="modality")
    if wanted is None and series.shows_no_contrast:
        raise VolumeError(
            f"holds {series.kind_words} images, which are taken only with --series", path=folder, reason="not-wanted"
        )
    if wanted is not None and not fitting([series], wanted):
        raise VolumeError("does not fit --series", path=folder, reason="not-wanted")


def _series_in(folder: Path, wanted: str | None) -> Series:
    try:
        return pick_series(folder)
    except VolumeError as error:
        if error.reason != "several-series" or wanted is None:
            raise
        return pick_series(folder, wanted)


# --- the network -------------------------------------------------------------------------------------------------


def _kernel(node: Node) -> Any:
    """Make the application entity that answers associations: who may call, and which objects it accepts."""
    try:
        from pynetdicom import AE
    except ModuleNotFoundError:
        raise RunError(
            "a DICOM node needs pynetdicom, which is not installed",
            reason="not-installed",
            hint="pip install 'chiasm[dicom]'.",
        ) from None
    kernel = AE(ae_title=check_title(node.title))
    kernel.require_called_aet = True
    kernel.require_calling_aet = [check_title(one) for one in node.allow]
    limits = node.limits
    kernel.maximum_associations = limits.associations
    kernel.maximum_pdu_size = OFFERED_PDU
    kernel.acse_timeout = limits.request_s
    kernel.dimse_timeout = kernel.network_timeout = limits.idle_s
    kernel.add_supported_context(VERIFICATION, list(PLAIN))
    for kind in IMAGES:
        kernel.add_supported_context(kind, list(SYNTAXES))
    return kernel


@contextmanager
def _listening(kernel: Any, node: Node, inbox: Inbox, say: Callable[[str], None]) -> Iterator[int]:
    """Take images into an inbox until the block ends; yields the port."""
    from pynetdicom import evt

    logger = logging.getLogger("pynetdicom")
    level = logger.level
    taken: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # bytes since the last image, by association
    limits, address = node.limits, (node.host, node.port)
    places = Places(limits.associations, limits.silent_s)

    def stored(event: Any) -> int:
        taken[event.assoc] = 0
        sender = _plain(event.assoc.requestor.ae_title)
        try:
            inbox.store(event.assoc, sender, event.encoded_dataset())
        except VolumeError:
            return NOT_UNDERSTOOD
        except InboxError as error:
            say(f"an image from {sender} was refused: {error.what}")
            return OUT_OF_RESOURCES
        except OSError:
            say(f"an image from {sender} could not be stored: the disk is full or gone")
            return OUT_OF_RESOURCES
        return SUCCESS

    def released(event: Any) -> None:
        inbox.released(event.assoc)

    def rejected(event: Any) -> None:
        caller = _plain(event.assoc.requestor.ae_title) or "nobody"
        say(f"an association with {caller} was refused{_why(event, node.title)}")

    handlers = [
        (evt.EVT_CONN_OPEN, _bound, [taken, places, limits]),
        (evt.EVT_ABORTED, _wake, [say]),
        (evt.EVT_FSM_TRANSITION, _let_go),
        (evt.EVT_C_STORE, stored),
        (evt.EVT_RELEASED, released),
        (evt.EVT_REJECTED, rejected),
    ]
    try:
        logger.setLevel(logging.CRITICAL + 1)  # it quotes what it receives
        server = kernel.make_server(address, evt_handlers=handlers, server_class=_gated(limits, places, say))
        Thread(target=server.serve_forever, args=(LOOK_S,), daemon=True).start()
    except (OSError, OverflowError) as error:
        logger.setLevel(level)
        raise ChiasmError(
            f"cannot listen on {address[0]}:{address[1]}: {getattr(error, 'strerror', None) or error}",
            reason="address",
            hint="Give another port with --dicom-port.",
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pydicom")  # they quote what is received
            yield int(server.server_address[1])
    finally:
        server.shutdown()
        hang_up(kernel)
        logger.setLevel(level)


def _why(event: Any, title: str) -> str:
    """Say that a caller used another title than the node's; what it called is not quoted."""
    asked = event.assoc.requestor.primitive
    return "" if asked is None or asked.called_ae_title == title else f": it called another title than {title}"


def _bound(event: Any, taken: WeakKeyDictionary[Any, int], places: Places, limits: Limits) -> None:
    """Limit the size and the time of a peer's messages; pynetdicom starts a new wait for each piece."""
    association = event.assoc
    connection = association.dul.socket
    connection.socket.settimeout(limits.idle_s)  # of sending
    association.dul._run_loop_delay = LOOP_S
    places.hear(association)

    def recv(count: int) -> bytearray:
        """Read as the connection's own method does, which this one replaces.

        Raises:
            OSError: If the peer sends more than is taken, is too slow or is gone; pynetdicom then ends the association.
        """
        taken[association] = taken.get(association, 0) + count
        if count > LONGEST_PDU or taken[association] > limits.image_bytes + LONGEST_PDU:
            connection.close()
            raise OSError("more than is taken")
        seconds = limits.idle_s if association.is_established else limits.request_s
        received = read_within(connection.socket, count, seconds)
        connection.socket.settimeout(limits.idle_s)
        places.hear(association)
        return received

    connection.recv = recv


def _wake(event: Any, say: Callable[[str], None]) -> None:
    """Wake the thread of an association that ended, which may be reading a PDU that never ends."""
    if event.assoc.dul.idle_timer_expired():
        say(f"an association with {_plain(event.assoc.requestor.ae_title)} was silent for too long and was ended")
    with suppress(OSError, AttributeError):  # it is closed already
        event.assoc.dul.socket.socket.shutdown(socket.SHUT_RD)


def _let_go(event: Any) -> None:
    """End the thread of an association without a valid request; it would wait for seconds."""
    if event.current_state == "Sta2" and event.next_state != "Sta3":
        event.assoc.dul.to_user_queue.put(None)


def _gated(limits: Limits, places: Places, say: Callable[[str], None]) -> type:
    """Make the server class of a node: connections wait at a gate, and only requests for associations get through."""
    from pynetdicom.transport import AssociationServer

    gate = Gate(limits.request_s, limits.waiting)

    class Server(AssociationServer):  # type: ignore[misc]
        """A server that associates with whoever asks for it."""

        request_queue_size = BACKLOG
        swept = 0.0

        def process_request(self, request: Any, client_address: Any) -> None:
            gate.admit(request, client_address)

        def service_actions(self) -> None:
            active = self.active_associations if len(gate) else []
            look = gate.look(places.free(active)) if len(gate) else Look((), 0)
            for association in places.make_room(active, look.asking):
                say(f"an association with {_plain(association.requestor.ae_title)} was silent and ended for another")
            if look.silent:
                say(f"connections that asked for nothing within {limits.request_s:g} s were closed: {look.silent}")
            for visitor in look.ready:
                self._associate(visitor)
            if time.monotonic() - self.swept > SWEEP_S:
                self.swept = time.monotonic()
                super().service_actions()

        def _associate(self, visitor: Visitor) -> None:
            try:
                self.finish_request(visitor.connection, visitor.address)
            except (OSError, RuntimeError):  # gone meanwhile, or no thread to be had
                self.shutdown_request(visitor.connection)

        def shutdown(self) -> None:
            TCPServer.shutdown(self)
            self.server_close()
            gate.close()

    return Server


def hang_up(kernel: Any) -> None:
    """End associations at once; pynetdicom itself waits for ever for a peer that never sent anything.

    Args:
        kernel: The application entity of pynetdicom whose associations end.
    """
    for _ in range(10):
        begun = kernel.active_associations
        if not begun:
            return
        associations = [one for one in begun if one.dul.is_alive()]  # one that only just began has not started it yet
        for association in associations:
            if association.is_established:
                association.abort(block=False)
        time.sleep(TICK_S)  # for the word to leave
        for association in associations:
            association.dul.kill_dul()
            association.dul.socket.close()


def _plain(title: str) -> str:
    return "".join(mark if mark.isprintable() else "?" for mark in title).strip()[:16]

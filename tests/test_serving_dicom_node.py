"""A DICOM node among others': what it takes, what it sends, whom it refuses, and what it forgets."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom
import pytest

from chiasm.commands.serving import NodeOptions
from chiasm.errors import ChiasmError, RecipeError, RunError, VolumeError
from chiasm.prediction.folders import load, predict
from chiasm.serving import dicom_node
from chiasm.serving.dicom_inbox import Inbox, InboxError, Limits
from chiasm.serving.dicom_node import Node, run_node, synthesise_series
from chiasm.serving.dicom_send import Peer, check_title, parse_peer, send
from chiasm.serving.server import serve
from chiasm.serving.stop import Stop
from chiasm.volumes import read_volume
from chiasm.volumes.screening import STRICT
from conftest import Archive, Sibling
from dicom_patients import TELLTALE, faults, reserved_port, run_tool, wait_for, write_mixed, write_source
from synthetic_cohort import SHAPE, pair

pytest.importorskip("pynetdicom", reason="pynetdicom is not installed (pip install 'chiasm[dicom]')")


def scanned(folder: Path, seed: int = 1, plane: str = "axial") -> list[Path]:
    image = np.rint(pair(seed, 5.0, SHAPE)[0]).astype(np.int16)
    return write_source(folder, image, plane, spacing=(1.0, 1.0, 3.0))


# --- the inbox ---------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def images(tmp_path: Path) -> list[bytes]:
    return [path.read_bytes() for path in write_source(tmp_path / "source")]


def make_inbox(tmp_path: Path, **limits: float) -> tuple[Inbox, Clock, Path]:
    clock, folder = Clock(), tmp_path / "spool"
    folder.mkdir()
    return Inbox(folder, Limits()._replace(**limits), clock), clock, folder


def test_a_series_over_two_associations_is_whole_when_both_are_released_and_it_is_quiet(
    images: list[bytes], tmp_path: Path
) -> None:
    inbox, clock, _ = make_inbox(tmp_path, quiet_s=5)
    for number, content in enumerate(images):
        inbox.store(number % 2, "A", content)
    inbox.released(0)
    clock.now = 100
    assert inbox.collect(lambda: {1}) == []  # one is still open
    inbox.released(1)
    (arrival,) = inbox.collect(set)
    assert (arrival.images, arrival.whole, arrival.sender) == (len(images), True, "A")
    assert sorted(path.read_bytes() for path in arrival.folder.iterdir()) == sorted(images)
    assert len(inbox) == 0 and inbox.collect(set) == []


def test_an_association_that_breaks_off_leaves_time_to_try_again_and_then_nothing(
    images: list[bytes], tmp_path: Path
) -> None:
    inbox, clock, folder = make_inbox(tmp_path, quiet_s=5, partial_s=60)
    inbox.store("a", "A", images[0])
    assert inbox.collect(lambda: {"a"}) == [] == inbox.collect(set)
    clock.now = 59
    assert inbox.collect(set) == []
    for content in images:  # all of it again, the first is there already
        inbox.store("b", "A", content)
    inbox.released("b")
    clock.now += 6
    assert [(one.images, one.whole) for one in inbox.collect(set)] == [(len(images), True)]
    inbox.store("c", "A", images[0])
    inbox.collect(set)
    clock.now += 61
    assert [one.whole for one in inbox.collect(set)] == [False]
    assert [path.name for path in folder.iterdir()] == ["series-1"]  # that of the whole one


def test_an_association_that_begins_while_the_others_are_counted_does_not_break_off(
    images: list[bytes], tmp_path: Path
) -> None:
    inbox, clock, _ = make_inbox(tmp_path, quiet_s=5)

    def counted_before_it() -> set[str]:
        inbox.store("late", "A", images[0])
        return set()

    assert inbox.collect(counted_before_it) == []
    inbox.released("late")
    clock.now = 6
    assert [(one.images, one.whole) for one in inbox.collect(set)] == [(1, True)]


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"image_bytes": 100}, "image is too large"),
        ({"series_bytes": 4000}, "series is too large"),
        ({"images": 2}, "series is too large"),
        ({"all_bytes": 4000}, "no room"),
        ({"series": 0}, "too many series"),
    ],
)
def test_every_limit_is_kept(limits: dict[str, float], told: str, images: list[bytes], tmp_path: Path) -> None:
    inbox, _, folder = make_inbox(tmp_path, **limits)
    with pytest.raises(InboxError, match=told):
        for content in images:
            inbox.store(1, "A", content)
    assert sum(1 for path in folder.rglob("*.dcm")) <= 2


def test_nothing_that_an_image_says_becomes_a_path(images: list[bytes], tmp_path: Path) -> None:
    inbox, _, folder = make_inbox(tmp_path)
    header = pydicom.dcmread(BytesIO(images[0]))
    with pydicom.config.disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header.SeriesInstanceUID, header.SOPInstanceUID, header.PatientID = "../../out", "/etc/passwd", "../x"
        content = BytesIO()
        header.save_as(content, enforce_file_format=False)
    inbox.store(1, "../A", content.getvalue())
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*")] == ["series-1", "series-1/000001.dcm"]
    with pytest.raises(VolumeError):
        inbox.store(1, "A", b"\0" * 128 + b"DICM")
    with pytest.raises(VolumeError):
        inbox.store(1, "A", b"no DICOM at all")


# --- options -----------------------------------------------------------------------------------------------------


def test_series_that_are_lost_when_the_node_ends_are_named_in_its_log(tmp_path: Path) -> None:
    series = [write_source(tmp_path / name, SeriesInstanceUID=f"1.2.3.{name}") for name in "12"]
    log: list[str] = []

    def say(line: str) -> None:
        log.append(line)
        if found := re.search(r"listens on .*:(\d+)", line):
            associations = [associate(int(found[1]), files[0]) for files in series]
            for association, files in zip(associations, series, strict=True):
                assert {association.send_c_store(file).Status for file in files} == {0}
            associations[0].release()  # the other goes on sending

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    plan = SimpleNamespace(sources=("t1",))
    predictor: Any = SimpleNamespace(model=SimpleNamespace(plan=plan), reading=STRICT, predict=interrupted)
    (tmp_path / "inbox").mkdir()
    node = Node(0, out=tmp_path / "out", limits=Limits(quiet_s=0))
    with pytest.raises(KeyboardInterrupt):
        run_node(predictor, node, tmp_path / "inbox", Lock(), Stop(), say)
    lost = [re.findall(r"series (\d): the node ended before it was done.* from (\w+)", line) for line in log[-2:]]
    assert lost == [[("1", "SENDER")], [("2", "SENDER")]]


def test_a_destination_is_read_or_refused() -> None:
    assert parse_peer("PACS@[::1]:104") == Peer("PACS", "::1", 104)
    for text in ("PACS", "PACS@host", "PACS@host:0", "PACS@host:70000", "@host:1", "P\\S@host:1", "A" * 17 + "@host:1"):
        with pytest.raises(RecipeError):
            parse_peer(text)
    assert check_title("MY NODE") == "MY NODE"


def test_a_node_is_not_opened_to_the_network_without_a_list_or_without_a_destination(
    finished_run: Path, tmp_path: Path
) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.7", "scanner.example"):
        with pytest.raises(RecipeError, match="--allow"):
            serve(finished_run, node=Node(0, host=host, out=tmp_path / "out"))
    with pytest.raises(RecipeError, match="nowhere"):
        serve(finished_run, node=Node(0))
    for options in (NodeOptions(send_to="PACS@127.0.0.1:104"), NodeOptions(out=tmp_path), NodeOptions(series=["t1"])):
        with pytest.raises(RecipeError, match=r"no node is started.*--dicom-port"):  # results would not be sent
            options.node("127.0.0.1")
    assert NodeOptions(series=["t1"]).node("127.0.0.1", takes_series=True) is None
    with pytest.raises(RunError, match="holds no model"):
        serve(tmp_path, node=Node(0, out=tmp_path / "out"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ChiasmError, match="cannot listen"):
            serve(finished_run, node=Node(other.getsockname()[1], out=tmp_path / "out"))


def test_without_pynetdicom_the_node_says_what_to_install(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynetdicom", None)
    with pytest.raises(RunError, match=r"chiasm\[dicom\]"):
        serve(finished_run, node=Node(0, out=tmp_path / "out"))


def test_series_that_a_model_does_not_take_are_refused(finished_run: Path, tmp_path: Path) -> None:
    predictor = load(finished_run)
    write_source(tmp_path / "ct", modality="CT")
    write_source(tmp_path / "phase", ImageType=["ORIGINAL", "PRIMARY", "P"])
    scanned(tmp_path / "t1")
    case = synthesise_series(tmp_path / "t1", tmp_path / "made", predictor, "t1 of")
    assert len(case.files) == SHAPE[2] + 1
    for folder, wanted, reason in (
        (tmp_path / "ct", None, "modality"),
        (tmp_path / "phase", None, "not-wanted"),
        (tmp_path / "t1", "flair", "not-wanted"),
        (tmp_path / "made" / "synthetic", None, "synthetic"),
    ):
        with pytest.raises(VolumeError) as caught:
            synthesise_series(folder, tmp_path / "again", predictor, wanted)
        assert caught.value.reason == reason and not (tmp_path / "again").exists()


def test_a_model_of_cbct_takes_a_ct_by_its_header_and_nothing_else(tmp_path: Path) -> None:
    def predicts(volume: object) -> None:
        raise VolumeError("was read", reason="read")

    plan = SimpleNamespace(sources=("cbct",))
    predictor: Any = SimpleNamespace(model=SimpleNamespace(plan=plan), reading=STRICT, predict=predicts)
    for modality, reason in (("CT", "read"), ("MR", "modality"), ("NM", "modality"), ("OT", "modality")):
        write_source(tmp_path / modality, Modality=modality)
        with pytest.raises(VolumeError) as caught:
            synthesise_series(tmp_path / modality, tmp_path / "made", predictor)
        assert caught.value.reason == reason


def test_a_mean_of_models_is_named_in_its_dicom_with_its_spread(
    finished_run: Path, sibling: Sibling, tmp_path: Path
) -> None:
    scanned(tmp_path / "t1")
    case = synthesise_series(tmp_path / "t1", tmp_path / "made", load([finished_run, sibling("node")]))
    assert [path.name for path in case.maps] == ["expected-error.dcm", "spread.dcm"]
    described = str(pydicom.dcmread(case.series[0], stop_before_pixels=True))
    assert "mean-of-2-A7" in described


def test_a_series_of_several_kinds_of_images_is_refused_or_chosen_by_words(finished_run: Path, tmp_path: Path) -> None:
    predictor = load(finished_run)
    arrays = [np.rint(pair(seed, 5.0, SHAPE)[0]).astype(np.int16) for seed in (1, 2)]
    kinds = [{"ImageType": ["ORIGINAL", "PRIMARY", letter]} for letter in "MP"]
    place = write_mixed(tmp_path / "in", kinds, arrays, spacing=(1.0, 1.0, 3.0))
    with pytest.raises(VolumeError) as refused:
        synthesise_series(place, tmp_path / "made", predictor)
    assert refused.value.reason == "several-series" and not (tmp_path / "made").exists()
    case = synthesise_series(place, tmp_path / "made", predictor, "magnitude")
    sources = {image.ReferencedSOPInstanceUID for image in pydicom.dcmread(case.series[0]).SourceImageSequence}
    assert sources <= {pydicom.dcmread(path).SOPInstanceUID for path in place.glob("0*")}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pynetdicom leaves its socket open
def test_what_nobody_takes_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiasm.serving.dicom_send.PAUSE_S", 0.0)
    with reserved_port() as port, pytest.raises(ChiasmError, match="6 of 6 objects could not be sent"):
        send(write_source(tmp_path / "t1"), Peer("NOBODY", "127.0.0.1", port), "CHIASM")


# --- the node among others ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """A node in a process of its own, which keeps results and sends them to an archive."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    out: Path
    temporary: Path

    def says(self, told: str) -> str:
        """Wait until its log holds a pattern."""
        return until(lambda: text if re.search(told, text := self.log.read_text()) else None)

    def send(self, *files: Path, caller: str = "SENDER", called: str = "CHIASM") -> int:
        words = ["-R", "-aet", caller, "-aec", called, "127.0.0.1", str(self.port)]
        return run_tool("storescu", *words, *files).returncode


def until(find: Callable[[], str | None], seconds: float = 120) -> str:
    last = time.monotonic() + seconds
    while time.monotonic() < last:
        if (found := find()) is not None:
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s in vain")


@pytest.fixture(scope="module")
def node(finished_run: Path, running_archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("node")
    (folder / "tmp").mkdir()
    words = ["serve", str(finished_run), "--dicom-port", "0", "--allow", "SENDER", "ARCHIVE", "--quiet", "1"]
    words += ["--send-to", f"ARCHIVE@127.0.0.1:{running_archive.dicom_port}", "-o", str(folder / "out")]
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "PYTHONUNBUFFERED": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "chiasm.cli", *words], stdout=log, stderr=log, env=environment
        )
    try:
        found = Running(process, 0, folder / "log", folder / "out", folder / "tmp").says(r"listens on")
        port = int(re.findall(r"127\.0\.0\.1:(\d+)", found)[0])
        running_archive.knows("node", "CHIASM", port)
        yield Running(process, port, folder / "log", folder / "out", folder / "tmp")
    finally:
        process.kill()
        process.wait()


def associate(port: int, file: Path) -> Any:
    """An association that may send what a file holds."""
    from pynetdicom import AE

    caller = AE(ae_title="SENDER")
    caller.add_requested_context(pydicom.dcmread(file).SOPClassUID)
    association = caller.associate("127.0.0.1", port, ae_title="CHIASM")
    assert association.is_established
    return association


def stored(pacs: Archive) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(BytesIO(content)) for content in pacs.files()]


@pytest.mark.slow
def test_echo_is_answered_to_those_who_are_allowed_and_call_it_by_its_title(node: Running) -> None:
    ask = ["127.0.0.1", str(node.port)]
    assert run_tool("echoscu", "-aet", "SENDER", "-aec", "CHIASM", *ask).returncode == 0
    assert run_tool("echoscu", "-aet", "SENDER", "-aec", "OTHER", *ask).returncode != 0
    assert run_tool("echoscu", "-aet", "STRANGER", "-aec", "CHIASM", *ask).returncode != 0
    node.says("an association with STRANGER was refused")
    node.says("SENDER was refused: it called another title than CHIASM")


@pytest.mark.slow
def test_a_series_sent_in_two_parts_comes_back_as_predict_would_write_it(
    node: Running, pacs: Archive, finished_run: Path, tmp_path: Path
) -> None:
    files = scanned(tmp_path / "in" / "t1", 2, "oblique")
    before = {path.name for path in node.out.iterdir()}
    first = associate(node.port, files[0])  # it stays, so no busy machine makes the pause longer than the quiet time
    assert all(first.send_c_store(path).Status == 0 for path in files[:5])
    assert node.send(*files[5:]) == 0
    first.release()
    node.says(r"13 objects sent to ARCHIVE@")
    (place,) = [path for path in node.out.iterdir() if path.name not in before]
    assert re.fullmatch(r"\d{8}-\d{6}-\d+", place.name)
    predict(finished_run, [tmp_path / "in"], tmp_path / "here", container="dicom")
    here, there = (read_volume(path / "synthetic") for path in (tmp_path / "here" / "t1", place))
    np.testing.assert_array_equal(here.array, there.array)
    np.testing.assert_array_equal(here.geometry.affine, there.geometry.affine)
    kept = {header.SOPInstanceUID: header for header in map(pydicom.dcmread, place.rglob("*.dcm"))}
    back = stored(pacs)
    assert len(back) == 13 and all(header == kept[header.SOPInstanceUID] for header in back)
    assert faults(place / "synthetic" / "0001.dcm") == []


@pytest.mark.slow
def test_an_archive_sends_to_the_node_and_gets_the_synthesis_back_but_once(
    node: Running, pacs: Archive, tmp_path: Path
) -> None:
    files = scanned(tmp_path / "t1", 3)
    pacs.stow(files)
    (study,) = json.loads(pacs.ask("/studies"))
    pacs.ask("/modalities/node/store", json.dumps([study]).encode(), method="POST")
    until(lambda: "done" if len(pacs.files()) == 25 else None)
    made = [header for header in stored(pacs) if header.get("SyntheticData") == "YES"]
    assert len(made) == 13 and {header.StudyInstanceUID for header in made} == {
        pydicom.dcmread(files[0]).StudyInstanceUID
    }
    (series,) = [name for name in json.loads(pacs.ask("/series")) if b"SYNTHETIC t2" in pacs.ask(f"/series/{name}")]
    pacs.ask("/modalities/node/store", json.dumps([series]).encode(), method="POST")
    node.says(r"refused \(synthetic\)")
    assert len(pacs.files()) == 25


@pytest.mark.slow
def test_a_bad_series_and_a_hostile_peer_do_not_stop_the_node(node: Running, pacs: Archive, tmp_path: Path) -> None:
    files = scanned(tmp_path / "gap", 4)
    middle = sorted(files, key=lambda path: pydicom.dcmread(path).InstanceNumber)[6]
    assert node.send(*[path for path in files if path != middle]) == 0
    with socket.create_connection(("127.0.0.1", node.port)) as hostile:  # two gigabytes are promised
        hostile.sendall(struct.pack(">BBL", 1, 0, 2**31) + b"x" * 1000)
        hostile.settimeout(60)
        assert hostile.recv(100) == b""
    with socket.create_connection(("127.0.0.1", node.port)) as hostile:
        hostile.sendall(random.Random(0).randbytes(4000))
    node.says(r"refused \(missing-slice\)")
    assert node.send(*scanned(tmp_path / "good", 5)) == 0
    until(lambda: "done" if len(pacs.files()) == 13 else None)


@pytest.mark.slow
def test_the_log_and_the_names_of_files_tell_nobody(node: Running) -> None:
    said = node.log.read_text() + "\n".join(str(path) for path in node.out.rglob("*"))
    secrets = [part for value in TELLTALE.values() for part in value.split("^")]
    assert "objects sent" in said and not [secret for secret in secrets if secret in said]
    assert "1.2.826.0.1.3680043.10.99" not in said and "Traceback" not in said


@pytest.mark.slow
def test_an_association_that_breaks_off_is_noticed(node: Running, tmp_path: Path) -> None:
    files = scanned(tmp_path / "t1", 6)
    association = associate(node.port, files[0])
    (spool,) = node.temporary.glob(".chiasm-*.serve/inbox")
    before = set(spool.iterdir())  # perhaps the series before, which is being removed
    assert association.send_c_store(files[0]).Status == 0
    (waiting,) = set(spool.iterdir()) - before
    association.abort()
    time.sleep(2)  # longer than the quiet time of a whole series
    assert [path.name for path in waiting.iterdir()] == ["000001.dcm"]


@pytest.mark.slow
def test_the_node_takes_every_compression_that_is_read(node: Running) -> None:
    from pynetdicom import AE

    coded = [f"1.2.840.10008.1.2.4.{end}" for end in (57, 70, 80, 81, 90, 91, 201, 202, 203)]
    caller = AE(ae_title="SENDER")
    for syntax in coded:
        caller.add_requested_context("1.2.840.10008.5.1.4.1.1.4", syntax)
    association = caller.associate("127.0.0.1", node.port, ae_title="CHIASM")
    taken = {context.transfer_syntax[0] for context in association.accepted_contexts}
    association.release()
    assert taken == set(coded)


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_node_in_time_and_leaves_nothing_behind(
    which: signal.Signals, finished_run: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with reserved_port() as port:
        words = ["serve", str(finished_run), "--dicom-port", str(port), "-o", str(tmp_path / "out")]
        process = subprocess.Popen([sys.executable, "-m", "chiasm.cli", *words], env=environment)
        try:
            wait_for(port, process)
            with socket.create_connection(("127.0.0.1", port)):  # someone who says nothing
                assert len(list(tmp_path.glob(".chiasm-*.serve"))) == 1
                process.send_signal(which)
                assert process.wait(60) == 0
        finally:
            process.kill()
    assert not list(tmp_path.glob(".chiasm-*.serve"))


def test_an_association_that_only_just_began_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread runs before the one that reads its socket, which Python would wait for at the end."""
    reading = [False, True, True]
    ended: list[str] = []
    reader = SimpleNamespace(
        is_alive=lambda: reading.pop(0) if len(reading) > 1 else reading[0],
        kill_dul=lambda: ended.append("reader"),
        socket=SimpleNamespace(close=lambda: ended.append("socket")),
    )
    kernel = SimpleNamespace(active_associations=[SimpleNamespace(dul=reader, is_established=False)])
    monkeypatch.setattr(dicom_node.time, "sleep", lambda _: kernel.active_associations.clear() if ended else None)
    dicom_node.hang_up(kernel)
    assert ended[:2] == ["reader", "socket"]

"""Whom the page serves, how much it takes, how long it waits, and what is left of a scan afterwards."""

from __future__ import annotations

import gzip
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import Any

import psutil
import pytest

from chiasm.cli import main
from chiasm.errors import ChiasmError, RecipeError, RunError
from chiasm.prediction.folders import Predictor, load
from chiasm.serving.jobs import Cancelled, FullError, JobQueue, Outcome, described
from chiasm.serving.server import serve
from chiasm.serving.spool import spooled
from chiasm.serving.web_limits import Page, WebLimits, is_loopback, read_token

pytest.importorskip("fastapi", reason="fastapi is not installed (pip install 'chiasm[serve]')")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (pip install 'chiasm[serve]')")

from chiasm.serving.web_gate import WebError, check_host, check_token
from dicom_patients import reserved_port, wait_for
from web_client import (
    Client,
    answer_in,
    body_of,
    head_of,
    problem,
    read_all,
    served,
    write_archive,
    write_scan,
    zipped,
)

TOKEN = "correct-horse-battery-staple"
SMALL = WebLimits(body_bytes=2**20, waiting=4, connections=12)
HASTY = WebLimits(head_s=0.6, idle_s=0.6)


@pytest.fixture(scope="module")
def predictor(finished_run: Path) -> Predictor:
    return load(finished_run)


@pytest.fixture
def small(predictor: Predictor, tmp_path: Path) -> Iterator[Client]:
    """A page that takes little at a time, and waits for everybody."""
    with served(predictor, tmp_path / "jobs", Page(0, limits=SMALL)) as client:
        yield client


@pytest.fixture
def hasty(predictor: Predictor, tmp_path: Path) -> Iterator[Client]:
    """A page that waits for nobody."""
    with served(predictor, tmp_path / "jobs", Page(0, limits=HASTY)) as client:
        yield client


# --- who may -----------------------------------------------------------------------------------------------------


def test_a_page_that_others_can_reach_needs_a_token_and_none_is_too_short() -> None:
    Page(0).check()
    Page(0, "::1").check()
    Page(0, "0.0.0.0", TOKEN).check()
    for host in ("0.0.0.0", "::", "192.168.1.7", "scanner.example"):
        with pytest.raises(RecipeError, match="--token-file") as caught:
            Page(0, host).check()
        assert caught.value.reason == "open"
    for token in ("short", "with a space in it, and long", "Zwetschgenknödel-and-more"):
        with pytest.raises(RecipeError, match="at least 16"):
            Page(0, token=token).check()
    assert TOKEN not in repr(Page(0, token=TOKEN))
    assert not is_loopback("127.0.0.1.example")


def test_a_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHIASM_TOKEN", raising=False)
    assert read_token(None) == ""
    monkeypatch.setenv("CHIASM_TOKEN", f" {TOKEN}\n")
    assert read_token(None) == TOKEN
    (tmp_path / "token").write_text("another-token-of-length\n")
    assert read_token(tmp_path / "token") == "another-token-of-length"
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "two").write_text("two words\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("empty", "two", "binary", "absent"):
        with pytest.raises(RecipeError) as caught:
            read_token(tmp_path / name)
        assert caught.value.reason == "token"


def test_the_command_has_no_option_for_the_token_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["serve", "RUN", "--port", "0", "--token", TOKEN])
    assert done.value.code == 2 and "No such option" in capsys.readouterr().err


def test_without_the_token_nothing_of_a_job_is_answered(predictor: Predictor, tmp_path: Path) -> None:
    with served(predictor, tmp_path / "jobs", Page(0, token=TOKEN)) as client:
        job = client.finish(client.hand_in({"t1": write_scan(tmp_path)}))
        paths = [f"/api/jobs/{job['id']}{end}" for end in ("", "/view", "/files/scan_t2.nii.gz")] + ["/api/model", "/x"]
        stranger = Client(client.port, client.folder, [])
        for given in ({}, {"Authorization": "Bearer wrong-but-long-enough"}, {"Authorization": f"Basic {TOKEN}"}):
            for path in paths:
                answer = stranger.ask("GET", path, headers=given)
                assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Bearer")
                assert problem(answer)["reason"] == "token" and TOKEN not in answer.text
            assert stranger.ask("DELETE", f"/api/jobs/{job['id']}", headers=given).status_code == 401
            assert stranger.ask("POST", "/api/jobs", data=b"x" * 10, headers=given).status_code == 401
        for path in ("/", "/api/health", "/api/openapi.json"):
            assert stranger.ask("GET", path).status_code == 200
        assert client.ask("GET", f"/api/jobs/{job['id']}").status_code == 200
        assert TOKEN not in "".join(client.log) and 'id="token"' in stranger.ask("GET", "/").text


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN, "Bearer ü"]
)
def test_only_the_whole_token_is_right(given: str) -> None:
    check_token(f"Bearer {TOKEN}", TOKEN)
    check_token(f"bearer  {TOKEN} ", TOKEN)
    with pytest.raises(WebError) as caught:
        check_token(given, TOKEN)
    assert caught.value.status == 401


def test_names_that_are_not_ours_are_refused_and_pages_of_others_too(small: Client) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "[::2]", "", "a@localhost@b"):
        status, said = answer_in(small.raw(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()))
        assert (status, said["reason"]) == (421, "host") and said["hint"]
    for host in ("localhost", f"LOCALHOST:{small.port}", "127.0.0.1", "[::1]:9"):
        assert b" 200 " in small.raw(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{small.port + 1}"):
        answer = small.ask("POST", "/api/jobs", files={"t1": b"x"}, headers={"Origin": origin})
        assert answer.status_code == 403 and problem(answer)["reason"] == "origin"
        assert "access-control-allow-origin" not in answer.headers and "as Host." in problem(answer)["hint"]
    assert small.ask("GET", "/api/model", headers={"Origin": small.root}).status_code == 200


def test_a_page_for_every_address_knows_addresses_but_no_names_of_others() -> None:
    page = Page(0, "0.0.0.0", TOKEN, ("scans.clinic.example",))
    for host in ("10.0.0.1:80", "[fe80::1]", "scans.clinic.example", socket.gethostname()):
        check_host({"host": host}, page)
    with pytest.raises(WebError):
        check_host({"host": "evil.example"}, page)


# --- how much ----------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused_by_its_length_or_as_it_comes(small: Client) -> None:
    large = body_of({"t1": ("a.nii.gz", bytes(2**21))})
    status, said = answer_in(small.raw(head_of(large)))  # nothing of the body is needed for that
    assert (status, said["reason"]) == (413, "too-large") and "1 MiB" in said["hint"]
    assert problem(small.ask("POST", "/api/jobs", files={"t1": ("a.nii.gz", bytes(2**21))}))["reason"] == "too-large"

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(large), 2**16):
            yield large[start : start + 2**16]

    unsaid = {"Content-Type": "multipart/form-data; boundary=edge"}
    answer = small.ask("POST", "/api/jobs", data=pieces(), headers=unsaid)  # chunked, without Content-Length
    assert answer.status_code == 413 and problem(answer)["reason"] == "too-large"
    assert small.stored() == []


def test_heads_and_forms_that_never_end_are_refused(small: Client) -> None:
    long_head = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2**18
    assert b" 400 " in small.raw(long_head).split(b"\r\n")[0]
    in_a_part = b'--edge\r\nContent-Disposition: form-data; name="' + b"a" * 2**19
    parts = b"".join(b'--edge\r\nContent-Disposition: form-data; name="series"\r\n\r\nx\r\n' for _ in range(40))
    long_rule = b'--edge\r\nContent-Disposition: form-data; name="series"\r\n\r\n' + b"x" * 10000
    for body in (in_a_part, parts, long_rule, b"", b"nonsense", b"--edge\r\n\r\n\r\n--edge--"):
        status, said = answer_in(small.raw(head_of(body) + body))
        assert status in (400, 422) and said["message"] and said["reason"]
    assert small.stored() == []


def test_slow_senders_are_cut_off(hasty: Client, predictor: Predictor, tmp_path: Path) -> None:
    """A head that stops, one that dribbles, a body that stops, one that dribbles, and one who says nothing."""
    steady = WebLimits(body_s=1.5)
    head, body = b"GET / HTTP/1.1\r\nHost: localhost\r\n", body_of({"t1": ("a.nii.gz", b"x" * 4000)})

    def dribble(client: Client, content: bytes, first: bytes = b"") -> tuple[float, bytes]:
        """Send a byte at a time until cut off; return the seconds, and the answer."""
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", client.port), 60) as line:
            line.sendall(first)
            line.setblocking(False)
            received = b""
            for mark in content:
                try:
                    line.send(bytes([mark]))
                    received += line.recv(4096)
                    break
                except BlockingIOError:
                    time.sleep(0.05)
                except OSError:
                    break
            else:
                assert not content, "all was taken"
            line.settimeout(60)
            received = received or read_all(line)
            return time.monotonic() - began, received

    with served(predictor, tmp_path / "steady", Page(0, limits=steady)) as other:
        for client, content, first, least, usual in (
            (hasty, b"", b"", HASTY.head_s, steady.head_s),
            (hasty, b"", head, HASTY.head_s, steady.head_s),
            (hasty, b"X: " + b"a" * 400, head, HASTY.head_s, steady.head_s),
            (hasty, b"", head_of(body) + body[:100], HASTY.idle_s, steady.idle_s),
            (other, body[100:], head_of(body) + body[:100], steady.body_s, HASTY.body_s),
        ):
            seconds, received = dribble(client, content, first)
            assert least <= seconds < usual, (content[:9], seconds)
            if first.startswith(b"POST"):
                assert answer_in(received)[1]["reason"] == "too-slow" and b" 408 " in received
            assert client.stored() == [] and client.ask("GET", "/api/health").status_code == 200


def connections_to(client: Client) -> int:
    """How many connections a page holds, which runs in this process."""
    found = psutil.Process().net_connections("tcp")
    return sum(one.laddr.port == client.port and one.status == psutil.CONN_ESTABLISHED for one in found)


def test_who_takes_nothing_of_an_answer_is_cut_off(hasty: Client) -> None:
    request, count = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 500  # more than the system holds for a line
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.settimeout(60)
        line.connect(("127.0.0.1", hasty.port))
        until(lambda: bool(connections_to(hasty)))  # the page has taken the line up
        line.sendall(request * count)
        until(lambda: not connections_to(hasty))  # nothing that is received shows it
        received = read_all(line)
    assert 0 < received.count(b"HTTP/1.1 200") < count
    assert hasty.ask("GET", "/api/health").status_code == 200


def test_clients_that_leave_leave_nothing_behind(small: Client) -> None:
    body = body_of({"t1": ("a.nii.gz", bytes(500_000))})
    for _ in range(2 * SMALL.waiting):  # more than may wait: each gives its place back
        with socket.create_connection(("127.0.0.1", small.port), 20) as line:
            line.sendall(head_of(body) + body[:200_000])
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # the line is torn
        until(lambda: list(small.folder.iterdir()) == [])
    assert "failed" not in "".join(small.log)


def test_too_many_connections_are_turned_away_and_the_others_are_served(small: Client) -> None:
    lines = [socket.create_connection(("127.0.0.1", small.port), 20) for _ in range(SMALL.connections)]
    try:
        answer = read_all(extra := socket.create_connection(("127.0.0.1", small.port), 20))
        extra.close()
        assert b" 503 " in answer and b"retry-after: 5" in answer and answer_in(answer)[1]["reason"] == "full"
        lines[0].sendall(b"GET /api/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b'"ok"' in read_all(lines[0])
    finally:
        for line in lines:
            line.close()


def test_of_64_requests_at_once_each_is_done_or_asked_to_come_again(predictor: Predictor, tmp_path: Path) -> None:
    scan, turn = write_scan(tmp_path), Lock()
    with served(predictor, tmp_path / "jobs", Page(0, limits=WebLimits(waiting=20)), turn) as client:
        with turn, ThreadPoolExecutor(64) as crowd:  # nothing is done before all were answered
            answers = list(crowd.map(lambda _: client.hand_in({"t1": scan}), range(64)))
        taken = [one for one in answers if one.status_code == 202]
        refused = [one for one in answers if one.status_code == 503]
        assert 20 <= len(taken) <= 21 and len(taken) + len(refused) == 64
        assert all(int(one.headers["retry-after"]) >= 1 and problem(one)["reason"] == "full" for one in refused)
        assert {client.finish(one)["state"] for one in taken} == {"done"}
        assert client.hand_in({"t1": scan}).status_code == 202


# --- what is in an upload ----------------------------------------------------------------------------------------


REFUSED = {"bomb", "zip-slip", "layout", "too-long"}


def test_bombs_and_members_that_lead_outside_are_refused(predictor: Predictor, tmp_path: Path) -> None:
    large = bytes(2**26)
    bad = {
        "a.nii.gz": gzip.compress(gzip.decompress(write_scan(tmp_path).read_bytes()) + large),
        "a.zip": zipped({"a.dcm": b"\0" * 128 + b"DICM" + large}),
        "b.zip": zipped({"../../led-out-of-a-zip.dcm": b"x", "/etc/led-out-of-a-zip.dcm": b"x"}),
        "c.zip": zipped({"a.zip": zipped({"a.dcm": large})}),
    }
    with served(predictor, tmp_path / "jobs", Page(0)) as client:
        for name, content in bad.items():
            job = client.finish(client.hand_in({"t1": (name, content)}))
            assert job["state"] == "failed" and job["error"]["reason"] in REFUSED, job["error"]
            assert "this is a mistake" not in job["error"]["hint"].lower()
        assert client.finish(client.hand_in({"t1": ("b.zip", bad["b.zip"])}))["error"]["reason"] == "zip-slip"
        assert client.stored() == [] and not list(tmp_path.parent.rglob("led-out-of-a-zip*"))


def test_names_of_files_become_no_paths(predictor: Predictor, tmp_path: Path) -> None:
    scan = write_scan(tmp_path).read_bytes()
    names = [
        "../../x.nii.gz",
        "/etc/passwd.nii.gz",
        "..\\..\\x.nii.gz",
        "a\0b.nii.gz",
        "CON.nii.gz",
        "-rf.nii.gz",
        "x" * 900 + ".nii.gz",
    ]
    with served(predictor, tmp_path / "jobs", Page(0)) as client:
        for name in names:
            body = body_of({"t1": (name, scan)})
            status, job = answer_in(client.raw(head_of(body) + body))
            assert status in (202, 400), name
            if status == 202:
                assert client.ask("DELETE", f"/api/jobs/{job['id']}").status_code == 204
        client.finish(client.hand_in({"t1": ("../x.nii.gz", scan)}))
        assert {path.name for path in client.stored()} == {
            "t1.nii.gz",
            "scan_t2.nii.gz",
            "scan_mask.nii.gz",
            "scan_expected-error.nii.gz",
        }


# --- what is kept ------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    last = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < last, f"waited {seconds} s in vain"
        time.sleep(0.005)


def writes(folder: Path, report: Callable[[str, float], None]) -> Outcome:
    (folder / "made").write_bytes(b"x" * 100)
    return Outcome({"made": "Made"}, ())


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[tuple[JobQueue, Clock, Path]]:
    clock, folder = Clock(), tmp_path / "jobs"
    folder.mkdir()
    limits = WebLimits(waiting=2, finished=3, keep_s=60, stored_bytes=1000)
    made = JobQueue(folder, limits, clock=clock)
    yield made, clock, folder
    made.close()
    assert list(folder.iterdir()) == []


def test_a_finished_job_is_forgotten_in_time(queue: tuple[JobQueue, Clock, Path]) -> None:
    jobs, clock, folder = queue
    job = jobs.begin()
    jobs.submit(job, writes)
    until(lambda: job.state == "done")
    clock.now = 59
    assert jobs.find(job.id) is job and jobs.expires_s(job) == 1 and len(list(folder.iterdir())) == 1
    clock.now = 60
    until(lambda: list(folder.iterdir()) == [])  # without anybody asking for it
    assert jobs.find(job.id) is None


def test_a_job_that_is_deleted_while_it_is_worked_on_ends_and_leaves_nothing(
    queue: tuple[JobQueue, Clock, Path],
) -> None:
    jobs, _, folder = queue
    begun, go_on, ended = Event(), Event(), Event()

    def slow(place: Path, report: Callable[[str, float], None]) -> Outcome:
        begun.set()
        go_on.wait(60)
        (place / "late").write_bytes(b"patient")
        try:
            report("predicting", 0.5)
        except Cancelled:
            ended.set()
            raise
        return Outcome({}, ())

    job = jobs.begin()
    jobs.submit(job, slow)
    assert begun.wait(60) and jobs.delete(job.id) and jobs.find(job.id) is None and not jobs.delete(job.id)
    go_on.set()
    assert ended.wait(60)
    until(lambda: list(folder.iterdir()) == [])


def test_jobs_that_are_lost_when_the_server_ends_are_named_in_its_log(tmp_path: Path) -> None:
    log: list[str] = []
    (tmp_path / "jobs").mkdir()
    jobs = JobQueue(tmp_path / "jobs", WebLimits(), log.append)
    done, _ = jobs.begin(), jobs.begin()
    jobs.submit(done, writes)
    until(lambda: done.state == "done")
    jobs.close()
    assert log[1:] == ["job 2: the server ended before it was done, removed"]


def test_places_are_counted_and_given_back(queue: tuple[JobQueue, Clock, Path]) -> None:
    jobs, clock, _ = queue
    first, second = jobs.begin(), jobs.begin()  # their files are still coming
    with pytest.raises(FullError, match="wait") as caught:
        jobs.begin()
    assert caught.value.retry_s >= 1
    jobs.delete(first.id)
    jobs.submit(second, writes)
    until(lambda: second.state == "done")
    for _ in range(2):
        job = jobs.begin()
        jobs.submit(job, writes)
        until(lambda job=job: job.state == "done")  # type: ignore[misc]
    clock.now = 20
    with pytest.raises(FullError, match="delete") as caught:
        jobs.begin()
    assert caught.value.retry_s == 40  # when the oldest goes
    jobs.delete(second.id)
    jobs.begin()


def test_a_mistake_of_ours_fails_its_job_alone_and_says_nothing_of_the_scan(
    queue: tuple[JobQueue, Clock, Path],
) -> None:
    jobs, _, folder = queue

    def wrong(place: Path, report: Callable[[str, float], None]) -> Outcome:
        (place / "scan").write_bytes(b"patient")
        raise KeyError("Miller^Anna")

    job = jobs.begin()
    jobs.submit(job, wrong)
    until(lambda: job.state == "failed")
    assert job.error is not None and "Miller" not in str(job.error) and list(folder.iterdir()) == []
    assert described(MemoryError()).reason == "out-of-memory"
    following = jobs.begin()
    jobs.submit(following, writes)
    until(lambda: following.state == "done")


def test_nothing_of_a_scan_is_kept_after_delete(predictor: Predictor, tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "scan.zip", {"a": {}})
    with served(predictor, tmp_path / "jobs", Page(0)) as client:
        job = client.finish(client.hand_in({"t1": archive}))
        address = f"/api/jobs/{job['id']}"
        assert client.ask("GET", f"{address}/view").status_code == 200 and len(client.stored()) == 5
        assert client.ask("DELETE", address).status_code == 204
        assert list(client.folder.iterdir()) == []
        for end in ("", "/view", "/files/scan_t2.nii.gz", "/files/dicom.zip"):
            assert client.ask("GET", address + end).status_code == 404
        assert job["id"] not in "".join(client.log) and "scan.zip" not in "".join(client.log)


# --- the process -------------------------------------------------------------------------------------------------


def test_without_a_port_or_a_package_the_command_says_what_to_do(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r"--port.*--dicom-port"):
        serve(finished_run)
    with pytest.raises(RecipeError, match="--token-file"):
        serve(finished_run, page=Page(0, "0.0.0.0"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ChiasmError, match=r"cannot listen.*--port"):
            serve(finished_run, page=Page(other.getsockname()[1]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"chiasm\[serve\]"):
        serve(finished_run, page=Page(0))


def test_spools_of_killed_servers_are_removed_and_those_of_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chiasm.storage import HOST

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (left := tmp_path / f".chiasm-{ended.pid}@{HOST}.abc.serve").mkdir()
    (left / "patient").write_bytes(b"x")
    (running := tmp_path / f".chiasm-{os.getppid()}@{HOST}.abc.serve").mkdir()
    (elsewhere := tmp_path / "kept").mkdir()
    (link := tmp_path / f".chiasm-{ended.pid}@{HOST}.def.serve").symlink_to(elsewhere)
    with spooled() as one, spooled() as two:
        assert one != two and one.stat().st_mode & 0o777 == 0o700
        assert set(tmp_path.iterdir()) == {running, elsewhere, link, one, two}
    assert set(tmp_path.iterdir()) == {running, elsewhere, link}


@pytest.mark.slow
def test_a_killed_server_leaves_nothing_for_longer_than_until_the_next_start(
    finished_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "CHIASM_TOKEN": TOKEN}
    ends: tuple[Any, ...] = (signal.SIGKILL, signal.SIGTERM)
    for which in ends:
        with reserved_port() as port, (tmp_path / "log").open("wb") as log:
            words = ["serve", str(finished_run), "--port", str(port), "--dicom-port", "0", "-o", str(tmp_path / "out")]
            process = subprocess.Popen(
                [sys.executable, "-m", "chiasm.cli", *words], env=environment, stdout=log, stderr=log
            )
            try:
                client = Client(port, tmp_path, [], {"Authorization": f"Bearer {TOKEN}"})
                wait_for(port, process)
                assert client.ask("GET", "/api/health").status_code == 200
                assert len(list((tmp_path / "tmp").iterdir())) == 1  # of this process alone
                assert client.finish(client.hand_in({"t1": write_scan(tmp_path)}))["state"] == "done"
                process.send_signal(which)
                process.wait(60)
            finally:
                process.kill()
                process.wait()
        assert bool(list((tmp_path / "tmp").iterdir())) == (which == signal.SIGKILL)
    assert "Traceback" not in (tmp_path / "log").read_text() and TOKEN not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_jobs(finished_run: Path, tmp_path: Path) -> None:
    scan, resident = write_scan(tmp_path), []
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with reserved_port() as port:
        words = [sys.executable, "-m", "chiasm.cli", "serve", str(finished_run), "--port", str(port)]
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
        try:
            wait_for(port, process)
            client = Client(port, tmp_path, [])
            for _ in range(50):
                job = client.finish(client.hand_in({"t1": scan}))
                assert job["state"] == "done"
                client.ask("DELETE", f"/api/jobs/{job['id']}")
                resident.append(psutil.Process(process.pid).memory_info().rss)
        finally:
            process.terminate()
            assert process.wait(60) == 0
    assert resident[49] < 1.1 * resident[4]

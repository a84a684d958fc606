"""Clients that do everything wrong, all at once, against `chiasm serve`: it answers each or hangs up, and goes on.

    python benchmarks/faults/clients.py RUN SCAN.nii.gz --seconds 45 --seed 5

Twelve clients at a time send noise, requests with changed bytes, scans with changed bytes, and odd addresses, leave in
the middle, and delete jobs at any moment.  Beside them proper clients hand in the scan.  Counted are the answers by
kind; a status of 500 or an end of the server is a fault.
"""

from __future__ import annotations

import argparse
import gzip
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import requests

CLIENTS = 12
PATIENCE_S = 3.0
FORM = b'--edge\r\nContent-Disposition: form-data; name="%b"; filename="a.nii.gz"\r\n\r\n%b\r\n--edge--\r\n'
HEAD = "POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=edge\r\n"


class Clients:
    """Clients of one server; each draws what it does from its own random numbers."""

    def __init__(self, port: int, scan: bytes) -> None:
        self.port, self.root = port, f"http://127.0.0.1:{port}"
        self.scan, self.source = scan, requests.get(f"{self.root}/api/model", timeout=60).json()["sources"][0]
        self.counts: Counter[tuple[str, str]] = Counter()

    def work(self, seed: int, seconds: float) -> None:
        """Do one thing after another."""
        dice, last = random.Random(seed), time.monotonic() + seconds
        kinds: dict[str, Callable[[random.Random], str]] = {
            "noise": lambda dice: self._raw(dice.randbytes(dice.randint(1, 3000))),
            "changed request": self._changed_request,
            "left in the middle": self._left,
            "proper": self._proper,
            "changed scan": self._changed_scan,
            "odd address": self._odd_address,
        }
        while time.monotonic() < last:
            kind = dice.choice(sorted(kinds))
            try:
                self.counts[kind, kinds[kind](dice)] += 1
            except OSError:  # a time-out or an end of the line
                self.counts[kind, "no answer"] += 1

    def _raw(self, content: bytes) -> str:
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE_S) as line:
            line.sendall(content)
            return line.recv(64)[9:12].decode("latin-1")

    def _request(self) -> bytes:
        body = FORM % (self.source.encode(), self.scan)
        return f"{HEAD}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body

    def _changed_request(self, dice: random.Random) -> str:
        request = bytearray(self._request())
        for _ in range(dice.randint(1, 20)):
            request[dice.randrange(400)] = dice.randrange(256)
        return self._raw(bytes(request))

    def _left(self, dice: random.Random) -> str:
        request = self._request()
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE_S) as line:
            line.sendall(request[: dice.randint(1, len(request))])
        return "left"

    def _hand_in(self, content: bytes) -> requests.Response:
        return requests.post(f"{self.root}/api/jobs", files={self.source: ("a.nii.gz", content)}, timeout=60)

    def _proper(self, dice: random.Random) -> str:
        answer = self._hand_in(self.scan)
        if answer.status_code != 202:
            return str(answer.status_code)
        address = f"{self.root}/api/jobs/{answer.json()['id']}"
        time.sleep(dice.random() / 2)
        shown = requests.get(f"{address}/view", timeout=120).status_code if dice.random() < 0.3 else ""
        return f"{shown} {requests.delete(address, timeout=60).status_code}".strip()

    def _changed_scan(self, dice: random.Random) -> str:
        is_packed = dice.random() < 0.3
        content = bytearray(self.scan if is_packed else gzip.decompress(self.scan))
        for _ in range(dice.randint(1, 8)):
            content[dice.randrange(len(content) if is_packed else 348)] = dice.randrange(256)  # or of the header
        answer = self._hand_in(bytes(content))
        job = answer.json()
        while job.get("state") in ("waiting", "running"):
            time.sleep(0.05)
            job = requests.get(f"{self.root}/api/jobs/{job['id']}", timeout=60).json()
        return f"{job.get('state', answer.status_code)} {(job.get('error') or {}).get('reason', '')}".strip()

    def _odd_address(self, dice: random.Random) -> str:
        path = "/" + "".join(dice.choice("abc/.%?#&=é\\ ~") for _ in range(dice.randint(0, 40)))
        return self._raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())


def wait_for(root: str) -> None:
    """Wait for a server's first answer."""
    while True:
        try:
            requests.get(f"{root}/api/health", timeout=5).raise_for_status()
            return
        except requests.ConnectionError:
            time.sleep(0.1)


def main() -> None:
    """Start a server, let the clients loose on it, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("scan", type=Path)
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--seed", type=int, default=5)
    asked = parser.parse_args()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    command = [sys.executable, "-m", "chiasm.cli", "serve", str(asked.run), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}")
        clients = Clients(port, asked.scan.read_bytes())
        seeds = range(asked.seed * 1000, asked.seed * 1000 + CLIENTS)
        threads = [threading.Thread(target=clients.work, args=(seed, asked.seconds)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        is_alive = requests.get(f"http://127.0.0.1:{port}/api/health", timeout=60).ok
    finally:
        server.terminate()
        ended = server.wait(30)
    for (kind, answer), count in sorted(clients.counts.items()):
        print(f"{count:5} {kind}: {answer}")
    faults = sum(count for (_, answer), count in clients.counts.items() if "500" in answer)
    print(f"{sum(clients.counts.values())} clients, {faults} answers of 500, alive: {is_alive}, exit {ended}")
    raise SystemExit(0 if is_alive and not faults and ended == 0 else 1)


if __name__ == "__main__":
    main()

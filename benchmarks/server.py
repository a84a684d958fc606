"""Measure the page of `chiasm serve`: its start, what it costs beside `chiasm predict`, and its memory.

    python benchmarks/server.py RUN SCAN.nii.gz              # a model of one source, and a scan for it
    python benchmarks/server.py RUN SCAN.nii.gz --requests 50 --memory
    python benchmarks/server.py RUN SERIES --requests 50 --memory     # a folder of DICOM: by DICOMweb, each a new study

Start is the time from the command to the first answer.  The cost is CPU time, which other work on the machine disturbs
less than time on the clock: of the server's process for a job, and of this process for the same prediction by
`chiasm.predict`, medians after one each that is not counted.  Memory is the resident set after requests 5 and 50.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil
import pydicom
import requests
from dicomweb_client import DICOMwebClient
from pydicom.uid import generate_uid

from chiasm.prediction.folders import predict

POLL_S = 0.5  # between two looks at a job; a look costs about 1.5 ms


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(run: Path) -> tuple[subprocess.Popen[bytes], str, float]:
    """Start a server and wait for its first answer; returns it, its address and the seconds."""
    address, began = f"http://127.0.0.1:{(port := free_port())}", time.monotonic()
    command = [sys.executable, "-m", "chiasm.cli", "serve", str(run), "--port", str(port), "--dicomweb"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        try:
            requests.get(f"{address}/api/health", timeout=5).raise_for_status()
            return server, address, time.monotonic() - began
        except requests.ConnectionError:
            time.sleep(0.02)


def hand_in(address: str, source: str, scan: Path) -> float:
    """Hand in a scan, wait until it is done, fetch all files and delete the job; returns the seconds."""
    began = time.monotonic()
    with scan.open("rb") as file:
        job = requests.post(f"{address}/api/jobs", files={source: (scan.name, file)}, timeout=600).json()
    while job["state"] in ("waiting", "running"):
        time.sleep(POLL_S)
        job = requests.get(f"{address}/api/jobs/{job['id']}", timeout=60).json()
    assert job["state"] == "done", job
    for made in job["files"]:
        requests.get(address + made["address"], timeout=60).raise_for_status()
    requests.delete(f"{address}/api/jobs/{job['id']}", timeout=60)
    return time.monotonic() - began


def store_and_retrieve(address: str, series: Path) -> float:
    """Send a series as a new study by STOW-RS, wait for the results and fetch them by WADO-RS; returns the seconds."""
    began = time.monotonic()
    images = [pydicom.dcmread(path) for path in sorted(series.iterdir())]
    study, number = generate_uid(), generate_uid()
    for image in images:
        image.StudyInstanceUID, image.SeriesInstanceUID, image.SOPInstanceUID = study, number, generate_uid()
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    web = DICOMwebClient(f"{address}/dicom-web")
    web.store_instances(images)
    while not web.search_for_series(study):
        time.sleep(POLL_S)
    assert len(web.retrieve_study(study)) > len(images)  # the image and its map
    return time.monotonic() - began


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("scan", type=Path)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--memory", action="store_true", help="Measure memory alone.")
    asked = parser.parse_args()
    server, address, seconds = start(asked.run)
    process = psutil.Process(server.pid)
    print(f"start: {sum(process.cpu_times()[:2]):.1f} s of CPU, {seconds:.1f} s until the first answer")
    source = requests.get(f"{address}/api/model", timeout=60).json()["sources"][0]
    ask = partial(store_and_retrieve, address) if asked.scan.is_dir() else partial(hand_in, address, source)
    served, clock, resident = [], [], []
    try:
        for _ in range(asked.requests):
            before = sum(process.cpu_times()[:2])
            clock.append(ask(asked.scan))
            served.append(sum(process.cpu_times()[:2]) - before)
            resident.append(process.memory_info().rss / 2**20)
    finally:
        server.terminate()
        server.wait()
    print(f"request: {statistics.median(served[1:]):.2f} s of CPU, {statistics.median(clock[1:]):.2f} s on the clock")
    if len(resident) >= 5:
        print(f"memory: {resident[4]:.0f} MiB after request 5, {resident[-1]:.0f} MiB after request {len(resident)}")
    if not asked.memory:
        alone, clock = [], []
        for _ in range(asked.requests):
            with tempfile.TemporaryDirectory() as out:
                cpu, began = time.process_time(), time.monotonic()
                predict(asked.run, [asked.scan], Path(out))
                alone.append(time.process_time() - cpu)
                clock.append(time.monotonic() - began)
        print(
            f"predict: {statistics.median(alone[1:]):.2f} s of CPU, {statistics.median(clock[1:]):.2f} s on the clock"
        )
        print(f"cost: {statistics.median(served[1:]) / statistics.median(alone[1:]) - 1:+.1%} of CPU")


if __name__ == "__main__":
    os.environ.setdefault("CHIASM_ENGINE", "torch")
    main()

"""`chiasm serve`: a page with a REST API, a DICOM node, or both, with one loaded model."""

from __future__ import annotations

import importlib.util
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, NamedTuple

from chiasm.errors import ChiasmError, RecipeError, RunError
from chiasm.prediction.folders import Predictor, load
from chiasm.serving.dicom_node import Node, check_node, check_one_source, run_node
from chiasm.serving.spool import spooled
from chiasm.serving.stop import Stop, until_stopped
from chiasm.serving.web_limits import Page

if TYPE_CHECKING:
    import uvicorn

TICK_S = 0.2
START_S = 0.01
END_S = 5  # seconds for answers that are under way when the server ends
EXTRA = ("fastapi", "uvicorn", "python_multipart")


def serve(
    run: Path | Sequence[Path],
    *,
    page: Page | None = None,
    node: Node | None = None,
    loading: Callable[[Path | Sequence[Path]], Predictor] = load,
    say: Callable[[str], None] = print,
) -> None:
    """Serve a model until Ctrl-C or SIGTERM; then remove the scans that were handed in.

    Args:
        run: A run folder or its model folder; of several, the images are averaged and their spread is written too.
        page: Where a page and a REST API listen; None for neither.
        node: Where a DICOM node listens, which needs a model of one source; None for none.
        loading: `load`, perhaps with options such as the average and the classes of others that it may load.
        say: Called with each line of the log.

    Raises:
        RecipeError: If there is neither, or one would be open to the network, or as `load`.
        RunError: As `load`, or if the model has more sources than a node can match, a package is not installed, or
            another process keeps results in the node's folder.
        ChiasmError: If an address cannot be listened on.
    """
    _check(page, node)
    say("loading the model; addresses follow")
    predictor = loading(run)
    if node is not None:
        check_one_source(predictor, run if isinstance(run, Path) else run[0])
    turn = Lock()
    with ExitStack() as held:
        stop = held.enter_context(until_stopped())
        spool = held.enter_context(spooled())
        thread = None
        if page is not None:
            thread = held.enter_context(answering(predictor, page, spool / "jobs", turn, say)).thread
        say(predictor.engine.announce())
        if node is not None:
            run_node(predictor, node, _made(spool / "inbox"), turn, stop, say)
        else:
            _wait(stop, thread)


def _check(page: Page | None, node: Node | None) -> None:
    """Refuse wrong settings before a model is loaded."""
    if page is None and node is None:
        raise RecipeError(
            "there is nothing to serve",
            reason="no-port",
            hint="Give --port for a page with a REST API, --dicom-port for a DICOM node, or both.",
        )
    if page is not None:
        page.check()
        if not all(importlib.util.find_spec(name) for name in EXTRA):
            raise RunError(
                "the page needs packages that are not installed",
                reason="not-installed",
                expected=", ".join(EXTRA),
                hint="pip install 'chiasm[serve]'.",
            )
    if node is not None:
        check_node(node)


def _wait(stop: Stop, thread: Thread | None) -> None:
    while not stop.asked.wait(TICK_S):
        if thread is not None and not thread.is_alive():
            raise ChiasmError("the page ended by itself", reason="failed", hint="Start it again.")


class Answering(NamedTuple):
    """A page that is being served.

    Attributes:
        port: Of TCP.
        thread: Answers requests.
    """

    port: int
    thread: Thread


@contextmanager
def answering(
    predictor: Predictor, page: Page, folder: Path, turn: Lock, say: Callable[[str], None]
) -> Iterator[Answering]:
    """Answer requests until the block ends; then remove the scans that were handed in.

    Args:
        predictor: The model.
        page: Where to listen, and who may use it.
        folder: Where jobs lie; it is made.
        turn: Held while a volume is predicted.
        say: Called with each line of the log.

    Raises:
        ChiasmError: If the address cannot be listened on.
    """
    from chiasm.serving.jobs import JobQueue
    from chiasm.serving.scans import Synthesiser
    from chiasm.serving.web_api import Service, make_app
    from chiasm.serving.web_gate import WebGate, gatekeeper

    queue = JobQueue(_made(folder), page.limits, say)
    try:
        app = WebGate(make_app(Service(Synthesiser(predictor, turn), queue, page, say)), page)
        with _listening(page) as listening, _running(app, gatekeeper(page.limits), listening) as thread:
            host, port = f"[{page.host}]" if ":" in page.host else page.host, listening.getsockname()[1]
            say(f"page and API at http://{host}:{port}/{' (with a token)' if page.token else ''}")
            yield Answering(port, thread)
    finally:
        queue.close()


@contextmanager
def _running(app: object, connection: type, listening: socket.socket) -> Iterator[Thread]:
    import uvicorn

    for name in ("uvicorn", "python_multipart"):  # they quote what is received, such as the ids of jobs
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=END_S,
    )
    server = uvicorn.Server(config)
    thread = Thread(target=_run, args=(server, listening), name="chiasm-page", daemon=True)
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            thread.join(START_S)
        yield thread
    finally:
        server.should_exit = True
        thread.join()


def _run(server: uvicorn.Server, listening: socket.socket) -> None:
    server.run(sockets=[listening])


@contextmanager
def _listening(page: Page) -> Iterator[socket.socket]:
    """Open the port first, so that a wrong port is reported alone."""
    listening = socket.socket(socket.AF_INET6 if ":" in page.host else socket.AF_INET)
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((page.host.strip("[]"), page.port))
        except (OSError, OverflowError) as error:
            raise ChiasmError(
                f"cannot listen on {page.host}:{page.port}: {getattr(error, 'strerror', None) or error}",
                reason="address",
                hint="Give another port with --port.",
            ) from error
        yield listening


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    return folder

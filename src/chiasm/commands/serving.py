"""Options of `chiasm serve`: those of its page and those of its DICOM node."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chiasm.commands.options import several
from chiasm.errors import RecipeError

if TYPE_CHECKING:
    from chiasm.serving.dicom_node import Node
    from chiasm.serving.web_limits import Page

OF_PAGE, OF_NODE = "Page and REST API", "DICOM node"


@dataclass(frozen=True)
class PageOptions:
    """Where the page listens, who may use it, and its limits."""

    port: Annotated[
        int | None, typer.Option("--port", help="Port of the page and the REST API.", rich_help_panel=OF_PAGE)
    ] = None
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            help="File with the token that requests must present; or the environment variable CHIASM_TOKEN.",
            rich_help_panel=OF_PAGE,
        ),
    ] = None
    name: Annotated[
        list[str] | None,
        typer.Option("--name", help="Another name that browsers call the server by.", rich_help_panel=OF_PAGE),
    ] = None
    waiting: Annotated[
        int, typer.Option("--waiting", min=1, help="Jobs that may wait for their turn.", rich_help_panel=OF_PAGE)
    ] = 32
    keep: Annotated[
        float,
        typer.Option("--keep", min=0.1, help="Minutes for which finished jobs are kept.", rich_help_panel=OF_PAGE),
    ] = 60.0
    most_mib: Annotated[
        int, typer.Option("--most-mib", min=1, help="Largest request, MiB.", rich_help_panel=OF_PAGE)
    ] = 2048

    dicomweb: Annotated[
        bool,
        typer.Option(
            "--dicomweb",
            help="Take and give studies by DICOMweb too; whoever may use the page can list its results.",
            rich_help_panel=OF_PAGE,
        ),
    ] = False

    def page(self, host: str, series: list[str] | None = None) -> Page | None:
        """Return the settings of the page; None without a port.

        Args:
            host: Address to listen on.
            series: Which series of a study is which source, for DICOMweb.

        Raises:
            RecipeError: If the token cannot be read.
        """
        if self.port is None:
            return None
        from chiasm.serving.web_limits import MIB, Page, WebLimits, read_token

        limits = WebLimits(body_bytes=self.most_mib * MIB, waiting=self.waiting, keep_s=60 * self.keep)
        rules = several(series) if self.dicomweb else None
        return Page(self.port, host, read_token(self.token_file), several(self.name), limits, rules)


@dataclass(frozen=True)
class NodeOptions:
    """Where a DICOM node listens, which senders it accepts, and where results go."""

    dicom_port: Annotated[
        int | None, typer.Option("--dicom-port", help="Port of the DICOM node.", rich_help_panel=OF_NODE)
    ] = None
    aet: Annotated[str, typer.Option("--aet", help="AE title of the DICOM node.", rich_help_panel=OF_NODE)] = "CHIASM"
    allow: Annotated[
        list[str] | None, typer.Option("--allow", help="AE titles that may send.", rich_help_panel=OF_NODE)
    ] = None
    send_to: Annotated[
        str | None, typer.Option("--send-to", help="Send results to AET@host:port.", rich_help_panel=OF_NODE)
    ] = None
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to keep results in.", rich_help_panel=OF_NODE)
    ] = None
    series: Annotated[
        list[str] | None,
        typer.Option(
            "--series", help="Take only series with these words; by DICOMweb also t1=WORDS.", rich_help_panel=OF_NODE
        ),
    ] = None
    quiet: Annotated[
        float,
        typer.Option("--quiet", help="Seconds of silence after which a series is complete.", rich_help_panel=OF_NODE),
    ] = 5.0

    def node(self, host: str, takes_series: bool = False) -> Node | None:
        """Return the settings of the node; None without a port.

        Args:
            host: Address to listen on.
            takes_series: Whether the page uses `--series`, for DICOMweb.

        Raises:
            RecipeError: If options of a node are given without its port.
        """
        if self.dicom_port is None:
            self._refuse_without_port(takes_series)
            return None
        from chiasm.serving.dicom_inbox import Limits
        from chiasm.serving.dicom_node import Node

        return Node(
            self.dicom_port,
            host=host,
            title=self.aet,
            allow=several(self.allow),
            send_to=self.send_to,
            out=self.out,
            series=" ".join(self.series) if self.series else None,
            limits=Limits(quiet_s=self.quiet),
        )

    def _refuse_without_port(self, takes_series: bool) -> None:
        """Refuse options that only a node uses: whoever gives them expects results to be sent or kept."""
        given = {
            "--aet": self.aet != NodeOptions.aet,
            "--allow": bool(self.allow),
            "--send-to": self.send_to is not None,
            "--out": self.out is not None,
            "--series": bool(self.series) and not takes_series,
            "--quiet": self.quiet != NodeOptions.quiet,
        }
        used = [option for option, is_given in given.items() if is_given]
        if used:
            raise RecipeError(
                "options of a DICOM node are given, but no node is started",
                reason="no-port",
                found=", ".join(used),
                hint="Give --dicom-port too, or leave them out.",
            )

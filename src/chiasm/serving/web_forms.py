"""The form of a scan: all files are stored in the job's folder under names of ours, or the whole form is refused."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from anyio import to_thread
from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from chiasm.cohorts.dicom_patients import parse_rules
from chiasm.serving.scans import ALL, SOURCES, Handed, check_handed, own_name
from chiasm.serving.web_gate import WebError

SERIES = "series"  # the field of rules, which may come several times
MOST_RULES, LONGEST_RULE = 16, 2000  # bytes of a rule
CHUNK = 2**20


async def receive_scan(request: Request, folder: Path, sources: Sequence[str]) -> Handed:
    """Receive a form with the files of a scan.

    Args:
        request: Whose body is not read yet.
        folder: Of the job; the files go into `SOURCES` in it.
        sources: Of the model.

    Raises:
        WebError: If it is no such form, or is larger or slower than is taken.
        ClientDisconnect: If the client leaves.
        ChiasmError: If files are missing, or a rule or the ending of a name is wrong.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise WebError(415, "the request is no form", "form", "Send multipart/form-data, a file for each source.")
    try:
        form = await request.form(max_files=len(sources) + 1, max_fields=MOST_RULES, max_part_size=LONGEST_RULE)
    except HTTPException as error:
        raise WebError(400, f"the form cannot be read: {error.detail}", "form", "Send it again.") from error
    try:
        return await to_thread.run_sync(_keep, form, folder, sources)
    finally:
        await form.close()


def _keep(form: FormData, folder: Path, sources: Sequence[str]) -> Handed:
    rules: list[str] = []
    files: dict[str, UploadFile] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile) and (value.size or value.filename):  # a browser sends empty fields too
            _check_field(name, files, sources)
            files[name] = value
        elif not isinstance(value, UploadFile):
            rules.append(_rule(name, value))
    check_handed(files, sources)
    parse_rules(rules, sources)
    names = {field: own_name(field, file.filename or "") for field, file in files.items()}
    (folder / SOURCES).mkdir(mode=0o700)
    for field, file in files.items():
        with (folder / SOURCES / names[field]).open("xb") as kept:
            shutil.copyfileobj(file.file, kept, CHUNK)
    return Handed({field: folder / SOURCES / name for field, name in names.items()}, tuple(rules))


def _check_field(name: str, files: dict[str, UploadFile], sources: Sequence[str]) -> None:
    if name not in (*sources, ALL):
        known = ", ".join((*sources, ALL))
        raise WebError(422, "a file is in a field that the form does not have", "field", f"The fields are {known}.")
    if name in files:
        raise WebError(422, f"there are two files in the field {name}", "field", "Send one file in each field.")


def _rule(name: str, value: str) -> str:
    if name != SERIES:
        raise WebError(
            422, "the form has a text in a field that takes none", "field", f"Text belongs in the field {SERIES}."
        )
    return value

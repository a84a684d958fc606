"""Cards that carry their own checksum, and files that are hashed once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from chiasm.checksums import check_checksum, content_hash, has_valid_checksum, with_checksum, without_checksum
from chiasm.errors import RunError

CONTENT = {"a": 1, "b": {"c": [1.5, "text"]}}


def test_the_checksum_is_the_sha256_of_the_content_with_sorted_keys() -> None:
    expected = hashlib.sha256(json.dumps(CONTENT, sort_keys=True).encode()).hexdigest()
    assert with_checksum(CONTENT) == {"checksum": expected, **CONTENT}


@pytest.mark.parametrize("name", ["checksum", "seal"])  # version 0.1 called it a seal
def test_a_card_is_valid_until_a_value_changes(name: str) -> None:
    card = {name: with_checksum(CONTENT)["checksum"], **CONTENT}
    assert has_valid_checksum(card) and without_checksum(card) == CONTENT
    assert not has_valid_checksum(card | {"a": 2})
    with pytest.raises(RunError, match="was changed since it was written"):
        check_checksum(card | {"a": 2}, Path("card.toml"), "Bring it back.")


def test_a_card_that_a_user_wrote_is_accepted_and_is_not_called_valid() -> None:
    check_checksum(CONTENT, Path("card.toml"), "")
    assert not has_valid_checksum(CONTENT) and not has_valid_checksum(None)


def test_a_file_that_changed_at_the_same_size_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    before = content_hash(path)
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (before, content_hash(path)) == tuple(hashlib.sha256(text).hexdigest() for text in (b"one", b"two"))

"""What of an output folder may be replaced or removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.errors import RunError
from chiasm.outputs import (
    refuse_data_folder,
    refuse_foreign,
    refuse_inputs,
    refuse_links,
    refuse_model_folder,
    remove_files,
)


def test_an_input_is_refused_by_any_spelling_link_or_folder_above_it(tmp_path: Path) -> None:
    (tmp_path / "out" / "cases").mkdir(parents=True)
    scan = tmp_path / "out" / "cases" / "t1.nii.gz"
    scan.write_text("scan")
    (tmp_path / "soft").symlink_to(scan)
    (tmp_path / "hard").hardlink_to(scan)
    spelled = [scan, tmp_path / "soft", tmp_path / "hard", scan.parent / ".." / "cases" / "t1.nii.gz"]
    for path in spelled:
        with pytest.raises(RunError, match="belongs to the data, and the map would replace it"):
            refuse_inputs([scan], [path], what="the map")
    for path in (spelled[0], spelled[1], spelled[3]):
        with pytest.raises(RunError, match="belongs to the data"):
            refuse_inputs([scan.parent], [path])
    refuse_inputs([tmp_path / "out" / "pictures", tmp_path / "other.nii.gz"], [scan, None])


def test_only_the_folder_of_the_data_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for out in (tmp_path / "data", tmp_path / "link"):
        with pytest.raises(RunError, match="is the folder of the data"):
            refuse_data_folder(out, [tmp_path / "data"])
    refuse_data_folder(tmp_path / "data" / "results", [tmp_path / "data"])
    refuse_data_folder(tmp_path / "missing", [tmp_path / "data"])


def test_files_of_somebody_else_are_named_three_at_most(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(RunError, match=r"holds a\.txt, b\.txt, c\.txt \(and 1 more\), which were not") as caught:
        refuse_foreign(tmp_path, ["*.txt"], way_out="To replace them: chiasm register --overwrite.")
    assert "chiasm register --overwrite" in str(caught.value)
    with pytest.raises(RunError, match=r"holds a\.txt, which was not written") as caught:
        refuse_foreign(tmp_path, ["a.txt", "z.txt"])
    assert "--overwrite" not in str(caught.value)
    refuse_foreign(tmp_path / "missing", ["a.txt", "*.txt"])


def test_a_link_that_leads_nowhere_is_a_file_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"plan\.toml"):
        refuse_foreign(tmp_path, ["plan.toml"])
    with pytest.raises(RunError, match="is a link"):
        refuse_links(tmp_path, ["cases", "plan.toml"])


def test_a_model_folder_takes_no_results(tmp_path: Path) -> None:
    refuse_model_folder(tmp_path)
    (tmp_path / "model.toml").write_text("")
    with pytest.raises(RunError, match="is a model folder"):
        refuse_model_folder(tmp_path)


def test_files_are_removed_by_name_and_never_through_a_link(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    for path in (out / "cases" / "a.html", out / "cases" / "mine.html", out / "pictures" / "a.png", other / "a.html"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (out / "linked").symlink_to(other)
    (out / "pictures" / "b.png").symlink_to(other / "a.html")
    remove_files(out, ["cases/a.html", "cases/gone.html", "pictures/a.png", "pictures/b.png", "linked/a.html"])
    assert not (out / "cases" / "a.html").exists() and (out / "cases" / "mine.html").exists()
    assert (out / "pictures" / "b.png").is_symlink() and (other / "a.html").exists()
    (out / "pictures" / "b.png").unlink()
    (out / "pictures" / "c.png").write_text("")
    remove_files(out, ["pictures/c.png"])
    assert not (out / "pictures").exists()

"""One prediction in one folder: what goes on, what is refused, and what is never replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from chiasm.checksums import sha256_of
from chiasm.cli import main
from chiasm.errors import RunError
from chiasm.prediction import resuming
from chiasm.prediction.folders import predict
from chiasm.prediction.manifest import Entry, read_manifest
from synthetic_cohort import affine, forget_digests, pair, save


@pytest.fixture(scope="module")
def predicted(toy_cohort: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return predict(finished_run, [toy_cohort], tmp_path_factory.mktemp("predicted"), only="test").folder


@pytest.fixture
def made(predicted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(predicted, tmp_path / "made"))


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def call(*words: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as done:
            main(list(map(str, words)))
        told = capsys.readouterr()
        return int(done.value.code or 0), told.out + told.err

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_the_manifest_says_what_each_file_is_and_where_things_lie_from_its_folder(
    predicted: Path, toy_cohort: Path, finished_run: Path
) -> None:
    manifest = read_manifest(predicted)
    for entry in manifest.cases:
        assert set(entry.sha256) == {entry.image, entry.mask, entry.expected_error}
        for name, digest in entry.sha256.items():
            assert digest == sha256_of(predicted / name)
        assert (predicted / entry.sources[0]).resolve().is_relative_to(toy_cohort) and entry.mask_rule == "nonzero"
    assert not Path(manifest.model).is_absolute() and (predicted / manifest.model).samefile(finished_run / "model")


def test_the_same_command_again_keeps_everything(made: Path, toy_cohort: Path, finished_run: Path, here) -> None:  # type: ignore[no-untyped-def]
    before = {path.name: path.stat().st_mtime_ns for path in made.glob("*.nii.gz")}
    code, told = here("predict", finished_run, toy_cohort, "-o", made, "--only", "test")
    count = len(read_manifest(made).cases)
    assert code == 0 and f"0 cases predicted, {count} were there already" in told
    assert {path.name: path.stat().st_mtime_ns for path in made.glob("*.nii.gz")} == before


def test_a_prediction_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(
    toy_cohort: Path, finished_run: Path, predicted: Path, tmp_path: Path
) -> None:
    def stop(done: int, _of: int, _name: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(finished_run, [toy_cohort], tmp_path, only="test", progress=stop)
    halfway = read_manifest(tmp_path)
    count = len(read_manifest(predicted).cases)
    assert len(halfway.cases) == 1 and len(halfway.pending) == count - 1
    (tmp_path / f"{halfway.pending[0]}_t2.nii.gz").write_bytes(b"half a case, of which the manifest says nothing yet")
    done = predict(finished_run, [toy_cohort], tmp_path, only="test")
    assert done.kept == (halfway.cases[0].case,) and len(done.done) == count - 1 and not done.manifest.pending
    ours, theirs = contents(tmp_path), contents(predicted)
    assert {name: ours[name] for name in ours if name != "predictions.json"} == {
        name: theirs[name] for name in theirs if name != "predictions.json"
    }


def test_more_cases_of_the_same_model_join_those_that_are_there(
    made: Path, toy_cohort: Path, finished_run: Path
) -> None:
    before = [entry.case for entry in read_manifest(made).cases]
    done = predict(finished_run, [toy_cohort], made, only="validation")
    assert not done.kept and {entry.case for entry in done.manifest.cases} == {*before, *done.done}


@pytest.mark.parametrize(
    ("changed", "options", "told"),
    [
        ({"sha256": "0" * 64}, [], "the model was A7, fold 0, seed 0, 000000000000 and is A7, fold 0, seed 0"),
        ({}, ["--resample-tilt"], "resample-tilt was False and is True"),
        ({"degraded": True}, [], "degrade was True and is False"),
        ({"container": "dicom"}, [], "format was dicom and is volume"),
        ({}, ["--precision", "32-true"], "precision was auto and is 32-true"),
    ],
)
def test_another_model_or_other_options_are_refused_unless_they_are_to_replace_all(  # type: ignore[no-untyped-def]
    changed: dict[str, object], options: list[str], told: str, made: Path, toy_cohort: Path, finished_run: Path, here
) -> None:
    change(made / "predictions.json", **changed)
    before = contents(made)
    words = ["predict", finished_run, toy_cohort / "Toy_0001" / "Toy_0001_t1.nii.gz", "-o", made, *options]
    code, said = here(*words)
    assert code == 2 and told in said and "--overwrite" in said and contents(made) == before
    code, said = here(*words, "--overwrite")
    assert code == 0 and "1 case predicted" in said
    assert sorted(contents(made)) == [f"Toy_0001_t1_{n}.nii.gz" for n in ("expected-error", "mask", "t2")] + [
        "predictions.json"
    ]


def test_another_file_of_the_same_name_does_not_replace_what_was_made_of_the_first(
    finished_run: Path, tmp_path: Path, here
) -> None:  # type: ignore[no-untyped-def]
    first = save(tmp_path / "a" / "scan.nii.gz", pair(1)[0], affine())
    other = save(tmp_path / "b" / "scan.nii.gz", pair(2)[0], affine())
    assert here("predict", finished_run, first, "-o", tmp_path / "made")[0] == 0
    before = contents(tmp_path / "made")
    code, said = here("predict", finished_run, other, "-o", tmp_path / "made")
    assert code == 2 and "other files" in said and "scan" in said and contents(tmp_path / "made") == before
    assert here("predict", finished_run, other, "-o", tmp_path / "made", "--overwrite")[0] == 0
    assert contents(tmp_path / "made")["scan_t2.nii.gz"] != before["scan_t2.nii.gz"]


def test_a_file_that_changed_is_refused_by_evaluation_and_made_again_by_prediction(  # type: ignore[no-untyped-def]
    made: Path, toy_cohort: Path, finished_run: Path, tmp_path: Path, here
) -> None:
    first, *others = read_manifest(made).cases
    whole = (made / first.image).read_bytes()
    shutil.copy(made / others[0].image, made / first.image)  # another case's image: nothing but the digest can tell
    code, said = here("evaluate", made, toy_cohort, "-o", tmp_path / "scored")
    assert code == 3 and f"{first.image}: was changed after chiasm predict wrote it" in said
    for entry in others:
        (made / str(entry.mask)).unlink()
    code, said = here("evaluate", made, toy_cohort, "-o", tmp_path / "none")
    assert code == 2 and "no predicted case could be scored" in said
    code, said = here("predict", finished_run, toy_cohort, "-o", made, "--only", "test")
    assert code == 0 and f"case {first.case}: its files had changed or were gone" in said
    assert (made / first.image).read_bytes() == whole and all((made / str(entry.mask)).exists() for entry in others)


def test_what_was_not_predicted_here_is_not_replaced(  # type: ignore[no-untyped-def]
    toy_cohort: Path, finished_run: Path, tmp_path: Path, here
) -> None:
    data = Path(shutil.copytree(toy_cohort / "Toy_0001", tmp_path / "data" / "Toy_0001"))
    before = contents(data)
    words = ["predict", finished_run, tmp_path / "data", "-o", data]
    for more in ([], ["--overwrite"]):  # the real t2 has the name that the synthetic one would get
        code, said = here(*words, *more)
        assert code == 2 and "belongs to the data" in said and contents(data) == before
    out = tmp_path / "out"
    out.mkdir()
    (out / "Toy_0001_t2.nii.gz").write_text("somebody's work")
    code, said = here("predict", finished_run, tmp_path / "data", "-o", out)
    assert code == 2 and "was not written by this prediction" in said
    assert contents(out) == {"Toy_0001_t2.nii.gz": b"somebody's work"}


def test_a_damaged_manifest_is_refused_and_one_of_an_earlier_version_is_gone_on_with(
    made: Path, toy_cohort: Path, finished_run: Path
) -> None:
    forget_digests(made)
    again = predict(finished_run, [toy_cohort], made, only="test")
    assert again.remade and not again.kept and all(entry.sha256 for entry in again.manifest.cases)
    (made / "predictions.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        predict(finished_run, [toy_cohort], made, only="test")


def test_a_tree_that_was_moved_is_evaluated_where_it_lies(
    toy_cohort: Path, finished_run: Path, tmp_path: Path, here
) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(finished_run / "model", tmp_path / "tree" / "model")
    shutil.copytree(toy_cohort, tmp_path / "tree" / "data")
    predict(tmp_path / "tree" / "model", [tmp_path / "tree" / "data"], tmp_path / "tree" / "made", only="validation")
    moved = tmp_path / "moved"
    (tmp_path / "tree").rename(moved)
    assert here("evaluate", moved / "made", moved / "data", "-o", moved / "scored")[0] == 0
    assert predict(moved / "model", [moved / "data"], moved / "made", only="validation").kept


def test_overwriting_a_dicom_series_removes_the_slices_that_were_written_and_no_file_beside_them(
    tmp_path: Path,
) -> None:
    place = tmp_path / "case" / "synthetic"
    place.mkdir(parents=True)
    for name in ("0001.dcm", "0002.dcm", "mine.dcm"):
        (place / name).write_text(name)
    sums = {f"case/synthetic/{name}": "0" * 64 for name in ("0001.dcm", "0002.dcm")}
    entry = Entry("case", "new", ("t1.dcm",), "case/synthetic", None, None, (), sha256=sums)
    resuming.remove_predictions(tmp_path, [entry])
    assert [path.name for path in place.iterdir()] == ["mine.dcm"]

"""The command that writes reports."""

import json
from pathlib import Path

import pytest
from run_folder import FID, write_run

from ldm.cli import report


def test_one_run_gets_its_report_and_several_share_one(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (write_run(root, tmp_path / name / "run") for name in "ab")
    assert report.main([str(first)]) == 0
    assert capsys.readouterr().out == f"wrote {first / 'report.html'}\n"
    out = tmp_path / "both.html"
    assert report.main([str(first), str(second), "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["report"] == str(out) and [run["run"] for run in printed["runs"]] == [str(first), str(second)]
    assert all(run["figures"]["inception"]["fid"]["value"] == FID["value"] for run in printed["runs"])
    assert all(run["speed"]["stage2"]["images_per_second"] == 8.0 for run in printed["runs"])
    assert all(f'<th class="n">{folder}</th>' in out.read_text() for folder in (first, second))  # called alike


def test_mistakes_are_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(root, tmp_path / "run")
    made, untrained, empty = (tmp_path / name for name in ("made", "untrained", "empty"))
    for folder in (made, untrained, empty):
        folder.mkdir()
    (made / "config.yaml").write_text("distillation: {}")
    (untrained / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    for arguments, expected in (
        ([empty], f"{empty}: no run (it has no config.yaml); give a folder that train_ldm.py made"),
        ([made], f"{made}: not a run of train_ldm.py, but made from one; give the run itself"),
        ([untrained], f"{untrained}: nothing to report, neither stage has metrics yet; train for some steps first"),
        ([run, run], "RUN: the same folder twice; give each run once"),
        ([run, "--out", empty], f"--out: {empty} is a folder; give a file, such as {empty / 'report.html'}"),
        ([run, "--out", empty / "no/x.html"], f"--out: no folder {empty / 'no'}; create it first"),
    ):
        assert report.main(list(map(str, arguments))) == 2
        assert capsys.readouterr().err == f"error: {expected}\n"


def test_a_run_that_has_not_begun_stage_two_is_reported_with_a_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(root, tmp_path / "run")
    (run / "stage2/metrics.jsonl").unlink()
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().err == f"{run}: stage two has not begun\n"

"""`gpu_acceptance.sh` and `resume_drill.py`: arguments, failing steps, interruption, results."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import resume_drill
from safetensors.numpy import save_file

# A stand-in for Python: it runs the bookkeeping scripts, prints the other commands, and fails the sampling steps.
FAKE_PYTHON = f"""#!/bin/sh
case "$*" in
  *benchmark_results.py*) exec {sys.executable} "$@" ;;
  *benchmark_fixtures.py*) mkdir -p "$2" && touch "$2/tiny.yaml" ;;
  *" attention "*) [ -z "$STARTED" ] || {{ echo $$ >"$STARTED"; exec sleep 60; }} ;;
  *" sample "*) printf 'sample:   0%%\\rsampling: 1%%\\nerror: no room "here"\\n' >&2; exit 2 ;;
esac
echo "$*"
"""


@pytest.fixture
def script(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    monkeypatch.setenv("PYTHON", str(python))

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(root / "scripts/gpu_acceptance.sh"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    return run


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_failing_step_is_recorded_and_the_next_one_runs(script: Any, tmp_path: Path) -> None:
    completed = script(tmp_path / "out", "--smoke")
    assert completed.returncode == 1, completed.stderr
    status = {(line["step"], line["status"]) for line in lines(tmp_path / "out")}  # the last steps run two at a time
    failed, skipped = (7, 8), {(3, "skipped"), (11, "skipped")}
    assert status == {(n, "failed" if n in failed else "passed") for n in range(11)} | skipped
    assert [line["error"] for line in lines(tmp_path / "out") if "error" in line] == ['error: no room "here"'] * 2
    assert (tmp_path / "out/errors.log").read_text().count('error: no room "here"') == 2
    assert 'failed in 0 s: error: no room "here"' in completed.stdout


def test_selected_steps_write_missing_fixtures_once(script: Any, tmp_path: Path) -> None:
    completed = script(tmp_path / "out", "--smoke", "--steps", "5-6")
    assert completed.returncode == 0, completed.stderr
    assert {line["step"] for line in lines(tmp_path / "out")} == {0, 5, 6}
    assert script(tmp_path / "out", "--steps", "2", "--smoke").returncode == 0
    assert [line["step"] for line in lines(tmp_path / "out")].count(0) == 1
    assert lines(tmp_path / "out")[-1]["step"] == 2


def test_every_measurement_goes_to_one_file(script: Any, tmp_path: Path) -> None:
    stdout = script(tmp_path / "out", "--smoke").stdout
    measured = [line for line in stdout.splitlines() if "/scripts/benchmark.py " in line or "/resume_drill.py " in line]
    assert len(measured) == 8  # those that do not fail
    assert all(f"--json {tmp_path / 'out/results.jsonl'} " in line for line in measured)


@pytest.mark.usefixtures("script")
def test_sigterm_stops_the_running_step(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    monkeypatch.setenv("STARTED", str(started))
    process = subprocess.Popen([root / "scripts/gpu_acceptance.sh", tmp_path / "out", "--smoke", "--steps", "1"])
    end = time.monotonic() + 30
    while not (started.exists() and started.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=30) == 130
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(started.read_text())).wait(timeout=30)


@pytest.mark.parametrize(
    "arguments", [(), ("--steps", "1"), ("out", "--steps", "12"), ("out", "--steps", "5-2"), ("out", "--fast")]
)
def test_wrong_arguments_print_the_usage(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    completed = script(*arguments)
    assert completed.returncode == 2 and completed.stderr.startswith("usage: ")
    assert not (tmp_path / "out").exists()


def test_the_resume_drill_refuses_an_existing_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["resume_drill.py", str(tmp_path), "--config", "configs/tiny.yaml"])
    assert resume_drill.main() == 2
    assert "give a new folder" in capsys.readouterr().err


def test_the_resume_drill_computes_the_largest_difference_of_two_exports(tmp_path: Path) -> None:
    for run, x in (("a", [0.0, 1.0]), ("b", [0.0, 3.0])):
        for part, tensor in (("unet", x), ("vae", [5.0])):
            (tmp_path / run / "pipeline" / part).mkdir(parents=True)
            save_file({"x": np.array(tensor)}, tmp_path / run / "pipeline" / part / "weights.safetensors")
    assert resume_drill.largest_difference(tmp_path / "a", tmp_path / "b") == 2

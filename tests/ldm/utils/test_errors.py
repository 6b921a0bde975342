"""What a command prints and its exit status."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.utils.errors import UserError, command, first_line, training_command, unknown_choice


class Broken(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, n: int) -> int:
        raise UserError("a.png: not a readable image; mend or remove it")


def run_command(action, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    return command(lambda _: action())([]), capsys.readouterr().err


def test_a_user_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> None:
        raise UserError("a key:\n  is wrong")

    assert run_command(action, capsys) == (2, "error: a key: is wrong\n")


def test_a_files_name_can_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> None:
        raise UserError("a\x1b[2J\x07.png: gone — fetch it")

    assert run_command(action, capsys) == (2, "error: a\\x1b[2J\\x07.png: gone — fetch it\n")


def test_a_user_error_in_a_data_loader_worker_is_the_same_line(capsys: pytest.CaptureFixture[str]) -> None:
    loader = iter(torch.utils.data.DataLoader(Broken(), num_workers=1))
    assert run_command(lambda: next(loader), capsys) == (2, "error: a.png: not a readable image; mend or remove it\n")
    loader._shutdown_workers()  # or this waits five seconds, in the test in which garbage is collected


class Killed(Broken):
    def __getitem__(self, n: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return n


def test_a_loader_process_that_is_killed_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    loaders = []

    def action() -> None:  # which reads as soon as there is a loader process
        loaders.append(iter(torch.utils.data.DataLoader(Killed(), num_workers=1)))
        next(loaders[0])

    status, line = run_command(action, capsys)
    loaders[0]._shutdown_workers()
    assert status == 2
    assert line.startswith("error: a loader process has ended (DataLoader worker (pid")
    assert "lower data.workers (and data.prefetch_factor" in line and line.endswith("the same command continues\n")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [(OSError("no weights\nin a/b"), "no weights"), (OSError("\ngone"), "gone"), (OSError(), "OSError")],
)
def test_the_first_line_of_an_error_is_never_empty(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_an_unknown_choice_is_reported_with_the_known_ones() -> None:
    assert str(unknown_choice("solver", "dmp", ("ddpm", "ddim", "lcm"))) == "solver: 'dmp'; give ddpm, ddim or lcm"


def test_success_is_status_0_and_other_errors_propagate(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: None, capsys) == (0, "")
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0, capsys)


def test_a_process_that_lost_another_reports_it_even_if_its_data_loader_fails_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def action() -> None:
        try:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer")
        except RuntimeError:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal") from None

    status, message = run_command(action, capsys)
    assert status == 2
    assert message.startswith("error: another process of this run has ended")
    assert message.count("\n") == 1
    with pytest.raises(RuntimeError, match="DataLoader"):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("DataLoader worker")), capsys)


def test_ctrl_c_is_one_line_and_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> None:
        raise KeyboardInterrupt

    assert run_command(action, capsys) == (130, "interrupted\n")
    assert training_command(lambda _: action())([]) == 130
    assert capsys.readouterr().err == "interrupted; the same command continues\n"


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("stage2.stepz=3", 2)])
def test_help_and_configuration_errors_of_train_ldm_do_not_import_torch(
    argument: str, status: int, root: Path, environment: dict[str, str]
) -> None:
    script = (
        "import sys, train_ldm\n"
        "try:\n"
        "    status = train_ldm.main(['--config', 'configs/tiny.yaml', sys.argv[1]])\n"
        "except SystemExit as exit:\n"
        "    status = exit.code\n"
        "assert not {'torch', 'diffusers', 'transformers', 'accelerate'} & sys.modules.keys()\n"
        "sys.exit(status)\n"
    )
    command = [sys.executable, "-c", script, argument]
    completed = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert completed.returncode == status, completed.stderr
    assert ("--dry-run" in completed.stdout) == (argument == "--help")
    assert ("unknown key 'stage2.stepz'" in completed.stderr) == (argument != "--help")

"""What a command says and returns."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.utils.errors import UserError, command


class Broken(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, n: int) -> int:
        raise UserError("a.png: not a readable picture; mend or remove it")


def said(action, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    return command(lambda _: action())([]), capsys.readouterr().err


def test_a_mistake_is_one_line_and_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> None:
        raise UserError("a key:\n  is wrong")

    assert said(action, capsys) == (2, "error: a key: is wrong\n")


def test_a_mistake_in_a_loader_process_is_the_same_line(capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> None:
        list(torch.utils.data.DataLoader(Broken(), num_workers=1))

    assert said(action, capsys) == (2, "error: a.png: not a readable picture; mend or remove it\n")


def test_success_is_zero_and_a_defect_of_ours_is_not_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(lambda: None, capsys) == (0, "")
    with pytest.raises(ZeroDivisionError):
        said(lambda: 1 / 0, capsys)


def test_a_process_that_is_left_alone_says_so_even_where_its_loader_falls_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def action() -> None:
        try:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer")
        except RuntimeError:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal") from None

    status, line = said(action, capsys)
    assert status == 2
    assert line.startswith("error: another process of this run has ended")
    assert line.count("\n") == 1
    with pytest.raises(RuntimeError, match="DataLoader"):
        said(lambda: (_ for _ in ()).throw(RuntimeError("DataLoader worker")), capsys)


def test_ctrl_c_is_one_line_and_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> None:
        raise KeyboardInterrupt

    assert said(action, capsys) == (130, "interrupted; the same command continues.\n")


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("stage2.stepz=3", 2)])
def test_help_and_mistakes_of_a_training_command_need_no_torch(
    argument: str, status: int, root: Path, environment: dict[str, str]
) -> None:
    script = (
        "import sys, train_ldm\n"
        "try:\n"
        "    status = train_ldm.main(['--config', 'configs/tiny.yaml', sys.argv[1]])\n"
        "except SystemExit as ended:\n"
        "    status = ended.code\n"
        "assert not {'torch', 'diffusers', 'transformers', 'accelerate'} & sys.modules.keys()\n"
        "sys.exit(status)\n"
    )
    command = [sys.executable, "-c", script, argument]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("--dry-run" in done.stdout) == (argument == "--help")
    assert ("unknown key 'stage2.stepz'" in done.stderr) == (argument != "--help")

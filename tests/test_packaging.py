"""The commands, modules and scripts that pyproject.toml, the workflow and the hooks name exist."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml


def test_every_command_of_the_package_can_be_called(root: Path) -> None:
    settings = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    for target in settings["project"]["scripts"].values():
        module, _, function = target.partition(":")
        packaged = module in settings["tool"]["setuptools"]["py-modules"] or module.startswith("ldm.")
        assert packaged and callable(getattr(importlib.import_module(module), function)), target


def test_every_sampling_script_is_a_command_too(root: Path) -> None:
    commands = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    modules = {path.stem for path in (root / "ldm/cli").glob("*.py") if "\ndef main(" in path.read_text("utf-8")}
    others = {"train_ldm:main", "ldm.app.launch:main"}
    assert {*commands.values()} == others | {f"ldm.cli.{module}:main" for module in modules}
    for module in modules:
        assert f"from ldm.cli.{module} import main" in (root / f"scripts/{module}.py").read_text("utf-8")


def test_a_command_runs_from_any_folder(root: Path, tmp_path: Path) -> None:
    """Called as its entry point does."""
    code = "import sys; from ldm.cli.ema import main; sys.argv[0] = '/usr/bin/ldm-ema'; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, "run", "--width", "2", "--out", "out"]
    completed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (completed.returncode, completed.stdout) == (2, "")
    assert completed.stderr == "error: --width: 2.0; give more than 0 and less than 0.2887\n"


def test_the_workflow_runs_the_same_checks(root: Path) -> None:
    workflow = yaml.safe_load((root / ".github/workflows/ci.yml").read_text("utf-8"))
    checks, drills = (step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step)
    assert os.access(root / checks, os.X_OK)
    assert drills == "make drills"


def test_every_script_of_a_hook_exists(root: Path) -> None:
    (repo,) = yaml.safe_load((root / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    for hook in repo["hooks"]:
        for word in hook["entry"].split():
            assert not word.endswith(".py") or (root / word).exists()

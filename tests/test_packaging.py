"""What pyproject.toml and the workflow name exists."""

import importlib
import os
import tomllib
from pathlib import Path

import yaml


def test_every_command_of_the_package_can_be_called(root: Path) -> None:
    settings = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    for target in settings["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert module in settings["tool"]["setuptools"]["py-modules"]
        assert callable(getattr(importlib.import_module(module), function))


def test_the_workflow_runs_the_same_checks(root: Path) -> None:
    workflow = yaml.safe_load((root / ".github/workflows/ci.yml").read_text("utf-8"))
    (command,) = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert os.access(root / command, os.X_OK)


def test_every_hook_is_a_check_that_exists(root: Path) -> None:
    (repo,) = yaml.safe_load((root / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    for hook in repo["hooks"]:
        for word in hook["entry"].split():
            assert not word.endswith(".py") or (root / word).exists()

"""Imports run one way: scripts and train_ldm.py → stages → ldm; in ldm, nothing imports pipeline."""

import ast
from pathlib import Path

STAGES = {"stage1_vae", "stage2_diffusion"}


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def packages(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_ldm_imports_no_stage_and_no_script(root: Path) -> None:
    for file in (root / "ldm").rglob("*.py"):
        assert not packages(imported(file)) & (STAGES | {"scripts", "train_ldm"}), file


def test_stages_do_not_import_each_other_nor_scripts(root: Path) -> None:
    for stage in STAGES:
        for file in (root / stage).rglob("*.py"):
            assert not packages(imported(file)) & ((STAGES - {stage}) | {"scripts", "train_ldm"}), file


def test_nothing_in_ldm_imports_the_pipeline(root: Path) -> None:
    for file in (root / "ldm").rglob("*.py"):
        assert file.name == "pipeline.py" or not any(n.startswith("ldm.pipeline") for n in imported(file)), file

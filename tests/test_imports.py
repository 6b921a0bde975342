"""Imports go one way: scripts and train_ldm.py → stages → ldm; within ldm, from later packages to earlier ones."""

import ast
from pathlib import Path

STAGES = {"stage1_vae", "stage2_diffusion"}
PACKAGES = [
    "utils",
    "config",
    "distributed",
    "diffusion",
    "models",
    "data",
    "sampling",
    "training",
    "evaluation",
    "cli",
    "app",
]


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def top_level(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_ldm_imports_no_stage_and_no_script(root: Path) -> None:
    for file in (root / "ldm").rglob("*.py"):
        assert not top_level(imported(file)) & (STAGES | {"scripts", "train_ldm"}), file


def test_stages_do_not_import_each_other_nor_scripts(root: Path) -> None:
    for stage in STAGES:
        for file in (root / stage).rglob("*.py"):
            assert not top_level(imported(file)) & ((STAGES - {stage}) | {"scripts", "train_ldm"}), file


def test_every_package_of_ldm_has_a_one_line_docstring_and_no_module_lies_outside(root: Path) -> None:
    assert {path.parent.name for path in (root / "ldm").glob("*/__init__.py")} == set(PACKAGES)
    assert [path.name for path in (root / "ldm").glob("*.py")] == ["__init__.py"]
    for package in PACKAGES:
        docstring = ast.get_docstring(ast.parse((root / "ldm" / package / "__init__.py").read_text("utf-8")))
        assert docstring and docstring.count("\n") == 0, package


def test_the_mathematics_of_diffusion_read_no_configuration(root: Path) -> None:
    for file in (root / "ldm/diffusion").glob("*.py"):
        packages = {name.split(".")[1] for name in imported(file) if name.startswith("ldm.")}
        assert packages <= {"diffusion", "utils"}, file


def test_packages_import_only_earlier_packages(root: Path) -> None:
    for number, package in enumerate(PACKAGES):
        for file in (root / "ldm" / package).rglob("*.py"):
            used = {name.split(".")[1] for name in imported(file) if name.startswith("ldm.")}
            assert used <= set(PACKAGES[: number + 1]), (file, used)

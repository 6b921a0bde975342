"""Imports run one way: scripts and train_ldm.py → stages → ldm; within ldm from later rooms to earlier ones."""

import ast
from pathlib import Path

STAGES = {"stage1_vae", "stage2_diffusion"}
ROOMS = ["utils", "config", "distributed", "diffusion", "models", "data", "sampling", "training", "evaluation", "cli"]


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


def test_every_module_of_ldm_lies_in_a_room_that_says_what_it_is_for(root: Path) -> None:
    assert {path.parent.name for path in (root / "ldm").glob("*/__init__.py")} == set(ROOMS)
    assert [path.name for path in (root / "ldm").glob("*.py")] == ["__init__.py"]
    for room in ROOMS:
        docstring = ast.get_docstring(ast.parse((root / "ldm" / room / "__init__.py").read_text("utf-8")))
        assert docstring and docstring.count("\n") == 0, room


def test_rooms_import_only_earlier_rooms(root: Path) -> None:
    for number, room in enumerate(ROOMS):
        for file in (root / "ldm" / room).rglob("*.py"):
            used = {name.split(".")[1] for name in imported(file) if name.startswith("ldm.")}
            assert used <= set(ROOMS[: number + 1]), (file, used)

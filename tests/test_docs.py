"""The data guide's blocks run, the reference is generated, and keys, links and commands on every page exist."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

import train_ldm
from ldm.config import kohya, loader
from ldm.config.presets import AUTOENCODERS, PROCESSES, UNETS
from ldm.config.schema import SOLVERS, SPACINGS, Config
from ldm.data.source_kinds import KINDS
from ldm.sampling.options import Sampling
from scripts import check_data, generate_reference

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted(ROOT.glob("stage*/README.md")),
    )
}
PAGE, STAGE1, SAMPLING = (PAGES[f"docs/guides/{name}.md"] for name in ("data", "autoencoder", "sampling"))
COMMANDS = {"scripts/check_data.py": check_data.main, "train_ldm.py": train_ldm.main}
Block = tuple[str, str]  # tag and content


def sections() -> dict[str, list[Block]]:
    """The fenced blocks under each heading of the data guide that has a block to execute."""
    blocks_by_heading: dict[str, list[Block]] = {}
    for part in re.split(r"^##+ ", PAGE, flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", part, flags=re.MULTILINE | re.DOTALL)
        if any(tag != "text" for tag, _ in blocks):
            blocks_by_heading[part.partition("\n")[0]] = blocks
    return blocks_by_heading


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the guide assumes: the bicycle is rotated by its EXIF orientation, the heron has transparency."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("assumed") / "pictures"
    folder.mkdir()
    for name, size, mode, orientation in (
        ("lighthouse.jpg", (60, 90), "RGB", 1),
        ("bicycle.jpg", (64, 96), "RGB", 6),
        ("heron.png", (48, 72), "RGBA", 1),
        ("fox.webp", (64, 64), "RGB", 1),
    ):
        assert f"`{name}`" in PAGE
        exif = Image.Exif()
        exif[0x0112] = orientation
        noise = Image.fromarray(rng.integers(0, 255, (6, 6, len(mode)), np.uint8))
        noise.resize(size, Image.Resampling.BICUBIC).save(folder / name, exif=exif)
    return folder


@pytest.fixture
def run_block(
    root: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> Callable[[str, str], str]:
    """Runs a block in the folder that the guide assumes, and returns what it printed."""
    for name in ("configs", "scripts", "train_ldm.py"):
        (tmp_path / name).symlink_to(root / name)
    shutil.copytree(image_folder, tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    shell = {
        **environment,
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": str(root),
    }

    def process(*command: str) -> str:
        completed = subprocess.run(command, env=shell, capture_output=True, text=True)
        assert completed.returncode == 0, f"{command[-1]}\n{completed.stderr}"
        return completed.stdout

    def run_in_process(text: str) -> str:
        """Runs one of the project's commands in this process, with the arguments that bash parses from the line."""
        _, command, *arguments = process("bash", "-euc", f"printf '%s\\0' {text}").split("\0")[:-1]
        AcceleratorState._reset_state(reset_partial_state=True)
        status = COMMANDS[command](arguments)
        printed = capsys.readouterr()
        expected = re.search(r"# exit status (\d)$", text)
        assert status == (int(expected[1]) if expected else 0), f"{text}\n{printed.out}{printed.err}"
        return printed.out

    def execute(tag: str, content: str) -> str:
        if tag == "python":
            exec(compile(content, "a block", "exec"), {})
            return capsys.readouterr().out
        if tag in ("yaml", "toml"):
            name = re.match(rf"# (\w+\.{tag})\n", content)
            assert name, f"the first line of a block of {tag} names its file:\n{content}"
            Path(name[1]).write_text(content, "utf-8")
            return ""
        assert tag == "sh"
        command = re.compile(r"^python (?:scripts/check_data|train_ldm)\.py (?:.*\\\n)*.*$", re.MULTILINE)
        printed, end = "", 0
        for match in command.finditer(content):
            printed += process("bash", "-euc", content[end : match.start()]) + run_in_process(match[0])
            end = match.end()
        return printed + process("bash", "-euc", content[end:])

    return execute


@pytest.mark.slow
@pytest.mark.parametrize("heading", sections())
def test_every_block_runs_and_prints_what_the_guide_shows(
    heading: str, run_block: Callable[[str, str], str], image_folder: Path, tmp_path: Path
) -> None:
    printed = ""
    for tag, content in sections()[heading]:
        if tag != "text":
            printed = run_block(tag, content)
            continue
        lines = {line.strip() for line in printed.splitlines()}
        for shown in [] if content.startswith("python ") else content.splitlines():
            start, ellipsis, _ = shown.strip().partition("…")
            assert any(line.startswith(start) if ellipsis else line == start for line in lines), f"{shown}\n{printed}"
    for file in image_folder.iterdir():
        assert (tmp_path / "pictures" / file.name).read_bytes() == file.read_bytes()
    assert len(list((tmp_path / "pictures").iterdir())) == 4


def test_the_data_guide_shows_the_message_of_every_detected_format() -> None:
    printed = [text for blocks in sections().values() for _, text in blocks]
    shown = {message for message in KINDS.values() if any(message in text for text in printed)}
    assert shown == set(KINDS.values())


def test_the_reference_is_generated_from_the_schema(root: Path) -> None:
    folder = root / "docs/reference"
    assert {path.name: path.read_text("utf-8") for path in folder.glob("*.md")} == generate_reference.pages()


def test_the_reference_has_every_key_preset_and_sampling_option() -> None:
    pages = generate_reference.pages()
    for name, section in Config.model_fields.items():
        for key in section.annotation.model_fields:  # type: ignore[union-attr]
            assert f"| `{name}.{key}` |" in pages[f"{name}.md"]
    for name in (*AUTOENCODERS, *UNETS, *PROCESSES):
        assert f"| `{name}` |" in pages["presets.md"]
    for field in dataclasses.fields(Sampling):
        assert f"| `{field.name}` | `{field.default!r}` |" in pages["sampling-options.md"]


def test_every_solver_and_spacing_is_in_the_sampling_guide() -> None:
    for name in (*SOLVERS, *SPACINGS):
        assert f"`{name}`" in SAMPLING


def test_every_key_on_a_page_exists() -> None:
    known = set(re.findall(r"^\| `([\w.]+)` \|", "".join(generate_reference.pages().values()), flags=re.MULTILINE))
    sections = "|".join(Config.model_fields)
    for path, page in PAGES.items():
        mentioned = set(re.findall(rf"(?<![\w/.-])(?:{sections})\.[a-z]\w*(?:\.\w+)*", page))
        assert {key for key in mentioned if not key.endswith((".md", ".py", ".json", ".toml"))} - known == set(), path


def test_every_link_has_a_target(root: Path) -> None:
    for path, page in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)):
            file, _, anchor = target.partition("#")
            if "://" in file:
                continue
            linked = ((root / path).parent / file).resolve() if file else root / path
            assert linked.exists(), (path, target)
            if anchor:
                headings = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), flags=re.MULTILINE)
                assert anchor in map(_slug, headings), (path, target)


def _slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_command_on_a_page_exists(root: Path) -> None:
    for path, page in PAGES.items():
        for block in re.findall(r"^```.*?^```$", page, flags=re.MULTILINE | re.DOTALL):
            for file in re.findall(
                r"(?<![\w/])(?:scripts|configs|stage1_vae|stage2_diffusion|tests)/[\w./-]+\.\w+", block
            ):
                assert (root / file).exists(), (path, file)
            for module in re.findall(r"python -m ((?:ldm|stage1_vae|stage2_diffusion)[\w.]+)", block):
                assert (root / f"{module.replace('.', '/')}.py").exists(), (path, module)


def test_every_import_on_a_page_works() -> None:
    for path, page in PAGES.items():
        for line in re.findall(r"^from (?:ldm|stage1_vae|stage2_diffusion)\b.* import .*$", page, flags=re.MULTILINE):
            try:
                exec(line, {})
            except ImportError as error:
                raise AssertionError(f"{path}: {line}") from error


def test_every_file_in_a_stages_readme_exists(root: Path) -> None:
    for stage in ("stage1_vae", "stage2_diffusion"):
        named = set(re.findall(r"`([\w/]+\.py)`", PAGES[f"{stage}/README.md"]))
        assert {name for name in named if not (root / stage / name).exists()} == set()


def test_the_architecture_page_names_every_package_of_ldm(root: Path) -> None:
    packages = re.findall(r"^\| `ldm/(\w+)/` \|", PAGES["docs/architecture.md"], flags=re.MULTILINE)
    assert sorted(packages) == sorted(path.parent.name for path in (root / "ldm").glob("*/__init__.py"))


def test_every_kohya_key_that_is_read_or_refused_is_in_the_data_guide() -> None:
    keys = {"image_dir", *kohya.SIZE_KEYS, *kohya.CAPTION_KEYS, *kohya.REPLACEMENTS}
    assert {key for key in keys if f"`{key}`" not in PAGE} == set()


def test_the_autoencoder_guide_lists_every_preset_with_its_factor_and_channels() -> None:
    rows = re.findall(r"^\| ((?:`[\w-]+`(?:, )?)+) \| ([\d, ;]+) \|", STAGE1, flags=re.MULTILINE)
    shown = {}
    for names, shapes in rows:
        shown |= dict(zip(re.findall(r"[\w-]+", names), shapes.split("; "), strict=True))
    expected = {}
    for name in AUTOENCODERS:
        tree = {"data": {"source": "x", "size": 64}, "stage1": {"model": name}}
        stage = loader.parse(tree, "a test").stage1
        expected[name] = f"{stage.factor}, {stage.latent_channels}"
    assert shown == expected

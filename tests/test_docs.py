"""The guide to data is executed; the reference is generated; keys, links and commands on every page exist."""

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
    """The fenced blocks under each heading that has some to execute."""
    found: dict[str, list[Block]] = {}
    for part in re.split(r"^##+ ", PAGE, flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", part, flags=re.MULTILINE | re.DOTALL)
        if any(tag != "text" for tag, _ in blocks):
            found[part.partition("\n")[0]] = blocks
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the page assumes; the bicycle lies on its side, and EXIF says so, and the heron is cut out."""
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
        few = Image.fromarray(rng.integers(0, 255, (6, 6, len(mode)), np.uint8))
        few.resize(size, Image.Resampling.BICUBIC).save(folder / name, exif=exif)
    return folder


@pytest.fixture
def reader(
    root: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> Callable[[str, str], str]:
    """What executes a block where the page says one is, and returns what it printed."""
    for name in ("configs", "scripts", "train_ldm.py"):
        (tmp_path / name).symlink_to(root / name)
    shutil.copytree(pictures, tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    shell = {
        **environment,
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": str(root),
    }

    def process(*command: str) -> str:
        done = subprocess.run(command, env=shell, capture_output=True, text=True)
        assert done.returncode == 0, f"{command[-1]}\n{done.stderr}"
        return done.stdout

    def own(text: str) -> str:
        """One of the project's own commands, run in this process, with the arguments that bash makes of the line."""
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
        ours = re.compile(r"^python (?:scripts/check_data|train_ldm)\.py (?:.*\\\n)*.*$", re.MULTILINE)
        printed, end = "", 0
        for found in ours.finditer(content):
            printed += process("bash", "-euc", content[end : found.start()]) + own(found[0])
            end = found.end()
        return printed + process("bash", "-euc", content[end:])

    return execute


@pytest.mark.slow
@pytest.mark.parametrize("heading", sections())
def test_every_block_runs_and_prints_what_the_page_shows(
    heading: str, reader: Callable[[str, str], str], pictures: Path, tmp_path: Path
) -> None:
    printed = ""
    for tag, content in sections()[heading]:
        if tag != "text":
            printed = reader(tag, content)
            continue
        lines = {line.strip() for line in printed.splitlines()}
        for shown in [] if content.startswith("python ") else content.splitlines():
            begins, rest, _ = shown.strip().partition("…")
            assert any(line.startswith(begins) if rest else line == begins for line in lines), f"{shown}\n{printed}"
    for file in pictures.iterdir():
        assert (tmp_path / "pictures" / file.name).read_bytes() == file.read_bytes()
    assert len(list((tmp_path / "pictures").iterdir())) == 4


def test_the_page_shows_how_every_kind_is_found() -> None:
    shown = {says for _, blocks in sections().items() for _, text in blocks for says in KINDS.values() if says in text}
    assert shown == set(KINDS.values())


def test_the_reference_is_what_the_schema_says(root: Path) -> None:
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


def test_every_solver_and_spacing_is_on_the_page_of_sampling() -> None:
    for each in (*SOLVERS, *SPACINGS):
        assert f"`{each}`" in SAMPLING


def test_every_key_on_a_page_exists() -> None:
    known = set(re.findall(r"^\| `([\w.]+)` \|", "".join(generate_reference.pages().values()), flags=re.MULTILINE))
    sections = "|".join(Config.model_fields)
    for path, page in PAGES.items():
        mentioned = set(re.findall(rf"(?<![\w/.-])(?:{sections})\.[a-z]\w*(?:\.\w+)*", page))
        assert {key for key in mentioned if not key.endswith((".md", ".py", ".json", ".toml"))} - known == set(), path


def test_every_link_leads_somewhere(root: Path) -> None:
    for path, page in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)):
            file, _, anchor = target.partition("#")
            if "://" in file:
                continue
            leads = ((root / path).parent / file).resolve() if file else root / path
            assert leads.exists(), (path, target)
            if anchor:
                headings = re.findall(r"^#+ (.*)$", leads.read_text("utf-8"), flags=re.MULTILINE)
                assert anchor in map(_slug, headings), (path, target)


def _slug(heading: str) -> str:
    """The anchor that a heading gets."""
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


def test_the_page_of_architecture_names_every_room(root: Path) -> None:
    rooms = re.findall(r"^\| `ldm/(\w+)/` \|", PAGES["docs/architecture.md"], flags=re.MULTILINE)
    assert sorted(rooms) == sorted(path.parent.name for path in (root / "ldm").glob("*/__init__.py"))


def test_every_key_of_kohyas_that_is_read_or_refused_is_on_the_page() -> None:
    keys = {"image_dir", *kohya.SIZE_KEYS, *kohya.CAPTION_KEYS, *kohya.REPLACEMENTS}
    assert {key for key in keys if f"`{key}`" not in PAGE} == set()


def test_every_preset_is_on_the_page_with_its_factor_and_channels() -> None:
    rows = re.findall(r"^\| ((?:`[\w-]+`(?:, )?)+) \| ([\d, ;]+) \|", STAGE1, flags=re.MULTILINE)
    shown = {}
    for names, shapes in rows:
        shown |= dict(zip(re.findall(r"[\w-]+", names), shapes.split("; "), strict=True))
    expected = {}
    for name in AUTOENCODERS:
        tree = {"data": {"source": "x", "size": 64}, "stage1": {"model": name}}
        one = loader.parse(tree, "a test").stage1
        expected[name] = f"{one.factor}, {one.latent_channels}"
    assert shown == expected

"""docs/your-own-data.md is executed; the keys on each page are those of the configuration."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from pydantic.fields import FieldInfo

import train_ldm
from ldm.config import kohya, loader
from ldm.config.presets import AUTOENCODERS
from ldm.config.schema import (
    SOLVERS,
    SPACINGS,
    AlignConfig,
    BucketConfig,
    ClassifierConfig,
    Config,
    DataConfig,
    DistillConfig,
    GanConfig,
    RunConfig,
    SampleConfig,
    Section,
    SourceConfig,
    Stage1Config,
    Stage2Config,
    TextConfig,
)
from ldm.data.sources import SAYS
from ldm.sampling.options import Sampling
from scripts import check_data

PAGE, STAGE1, STAGE2, TRAINING, SAMPLING = (
    (Path(__file__).parents[1] / f"docs/{name}.md").read_text("utf-8")
    for name in ("your-own-data", "stage1", "stage2", "training", "sampling")
)
KEYS = {  # of each page
    PAGE: {"data": DataConfig, "data.source": SourceConfig, "data.buckets": BucketConfig},
    STAGE1: {"stage1": Stage1Config, "stage1.gan": GanConfig, "stage1.align": AlignConfig},
    STAGE2: {"stage2": Stage2Config, "text": TextConfig},
    TRAINING: {"run": RunConfig, "sample": SampleConfig},
}
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
        ("lighthouse.jpg", (60, 90), "RGB", 1), ("bicycle.jpg", (64, 96), "RGB", 6),
        ("heron.png", (48, 72), "RGBA", 1), ("fox.webp", (64, 64), "RGB", 1),
    ):  # fmt: skip
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
            return process(sys.executable, "-c", content)
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
    shown = {says for _, blocks in sections().items() for _, text in blocks for says in SAYS.values() if says in text}
    assert shown == set(SAYS.values())


@pytest.mark.parametrize("page", KEYS, ids=["data", "stage1", "stage2", "training"])
def test_every_key_is_on_its_page_with_its_default(page: str) -> None:
    fields = {
        f"{prefix}.{name}": field
        for prefix, section in KEYS[page].items()
        for name, field in section.model_fields.items()
    }
    keys = rf"(?:{'|'.join(Config.model_fields)})\.[\w.]+"
    rows = dict(re.findall(rf"^\| `({keys})` \|([^|]*)\|", page, flags=re.MULTILINE))
    _check(rows, fields)


@pytest.mark.parametrize(
    ("title", "section"), [("a distillation", DistillConfig), ("the classifier", ClassifierConfig)]
)
def test_every_key_of_what_follows_training_is_on_the_page_of_sampling(title: str, section: type[Section]) -> None:
    part = SAMPLING.partition(f"\n## Every key of {title}\n")[2].partition("\n#")[0]
    _check(dict(re.findall(r"^\| `(\w+)` \|([^|]*)\|", part, flags=re.MULTILINE)), section.model_fields)


def test_every_way_to_draw_is_on_the_page_of_sampling() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \|([^|]*)\|", SAMPLING.partition("## In Python")[2].partition("\n## ")[0], re.MULTILINE
    )
    expected = {f.name: f.default for f in dataclasses.fields(Sampling)}
    assert [name for name, _ in rows] == list(expected)
    for name, shown in rows:
        default = expected[name]
        assert shown.strip() == ("–" if default is None else '`""`' if default == "" else f"`{default}`"), name
    for each in (*SOLVERS, *SPACINGS):
        assert f"`{each}`" in SAMPLING


def _check(rows: dict[str, str], fields: Mapping[str, FieldInfo]) -> None:
    """That a table's rows, defaults by key, are those of the configuration."""
    assert rows.keys() == fields.keys()
    for key, shown in rows.items():
        default = fields[key].default
        if match := re.fullmatch(r" `([^`]+)` ", shown):
            assert match[1] == (str(default) if isinstance(default, (str, Path)) else json.dumps(default)), key
        else:
            assert fields[key].is_required() or default is None, key


def test_every_key_on_the_page_exists() -> None:
    known = {"data.source", "data.buckets"}
    for name, section in Config.model_fields.items():
        known |= {f"{name}.{key}" for key in section.annotation.model_fields}  # type: ignore[union-attr]
    known |= {f"data.source.{key}" for key in SourceConfig.model_fields}
    known |= {f"data.buckets.{key}" for key in BucketConfig.model_fields}
    mentioned = set(re.findall(rf"(?<![\w/.])(?:{'|'.join(Config.model_fields)})\.\w+(?:\.\w+)*", PAGE))
    assert mentioned - known == set()
    assert len(mentioned) > 40


def test_every_key_of_kohyas_that_is_read_or_refused_is_on_the_page() -> None:
    keys = {"image_dir", *kohya.SIZES, *kohya.CAPTIONS, *kohya.INSTEAD}
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

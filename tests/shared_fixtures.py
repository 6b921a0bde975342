"""Fixtures of all tests: the root, small models, a finished tiny run, calling commands as a user does."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType

import flops
import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from filelock import FileLock
from forked import Forked, ScriptProcess
from of_config import indexed_once
from PIL import Image
from tiny import TINY, WORDS
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer

from ldm.config import loader
from ldm.config.schema import Stage1Config, Stage2Config
from ldm.data import openmoji
from ldm.data.index import Index
from ldm.diffusion.process import DiffusionProcess
from ldm.models import autoencoder, text_encoder, text_encoder_files, unet
from ldm.models.autoencoder import Autoencoder, Identity
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.solvers import scheduler
from ldm.training import throughput

ROOT = Path(__file__).parents[1]
Main = Callable[[list[str]], int]


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps one state a process; each test has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def flops_counted_once(of_all_workers: Path) -> Iterator[None]:
    """Tests train hundreds of small networks, in this process and in forks. `test_throughput` holds that the count is
    right."""
    folder = of_all_workers / "flops"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(flops.COUNTS, str(folder))
        patch.setattr(throughput, "forward_flops", flops.count_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk() -> Iterator[None]:
    """No test cuts the power: what a killed process wrote is there without fsync."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pytest-xdist's workers share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def drawn(of_all_workers: Path) -> Path:
    """A cache that tests share, at once too: images that one of them rendered and indexed are there for the next."""
    folder = of_all_workers / "drawn"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def drawings(tmp_path: Path, drawn: Path) -> Callable[..., tuple[loader.Config, Index]]:
    """Settings of configs/tiny.yaml at 16 px with overrides, and the index of their images."""

    def load(*overrides: str) -> tuple[loader.Config, Index]:
        settings = loader.load(
            ROOT / "configs/tiny.yaml",
            [f"run.dir={tmp_path / 'run'}", "run.tracker=none", "data.size=16", f"data.cache_dir={drawn}", *overrides],
        )
        return settings, indexed_once(settings)

    return load


@pytest.fixture
def three_shapes(tmp_path: Path) -> Callable[[list[str]], Path]:
    """Writes a folder of images, one for each caption, that are square, wide and tall in turn."""

    def write(captions: list[str]) -> Path:
        rng, folder = np.random.default_rng(0), tmp_path / "images"
        folder.mkdir()
        for i, caption in enumerate(captions):
            width, height = [(20, 20), (36, 14), (18, 33)][i % 3]
            Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(folder / f"{i:02}.png")
            (folder / f"{i:02}.txt").write_text(caption)
        return folder

    return write


@pytest.fixture(scope="session")
def words(of_all_workers: Path) -> Path:
    """The folder of a small text encoder, with dropout layers and a pooler that no hidden state depends on.

    Its tokenizer has a fourth of the demo's tokens, which load faster: frequent ones, and words of the captions.
    """
    folder = of_all_workers / "words"
    with FileLock(of_all_workers / "words.lock"):
        if not folder.exists():
            write_text_encoder(folder)
    return folder


def write_text_encoder(folder: Path) -> None:
    captions = {word for drawing in openmoji.drawings("openmoji-demo") for word in drawing.captions[0].lower().split()}
    vocabulary = AutoTokenizer.from_pretrained(text_encoder_files.local_folder(text_encoder_files.MINILM)).get_vocab()
    kept = [token for token, i in sorted(vocabulary.items(), key=itemgetter(1)) if i < 7500 or token in captions]
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(kept)}, model_max_length=512)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_dropout_prob=0.5, **shape)).save_pretrained(folder)


@pytest.fixture(scope="session", autouse=True)
def tiny_reads_words(words: Path) -> None:
    os.environ[WORDS] = str(words)


@pytest.fixture
def vae() -> Autoencoder:
    """An autoencoder of 16 px with random weights: four channels, half the side."""
    return random_vae()


def random_vae() -> Autoencoder:
    torch.manual_seed(0)
    stage = Stage1Config(channels=(16, 16), layers=1, latent_channels=4, norm_num_groups=8, mid_attention=False)
    return Autoencoder(autoencoder.build(stage, 16))


@pytest.fixture(scope="session")
def random_model(words: Path) -> Callable[..., LatentDiffusion]:
    """Builds a model of 16 px with random weights and these conditions; its classes are cat, dog and heart."""

    def build(*conditions: str, pixels: bool = False) -> LatentDiffusion:
        vae = random_vae()
        with torch.no_grad():  # a posterior that is a point: diffusers draws from it
            vae.vae.quant_conv.weight[4:] = 0
            vae.vae.quant_conv.bias[4:] = -30
        stage = Stage2Config(
            conditions=conditions,
            channels=(8, 8),
            attention=(False, True),
            layers=1,
            attention_head_dim=8,
            norm_num_groups=4,
        )
        encoder = text_encoder.load(str(words), 8) if stage.text else None
        side, count = (16, 3) if pixels else (8, 4)
        torch.manual_seed(0)
        network = unet.build(stage, count, side, encoder.width if encoder else 0, 3).eval()
        return LatentDiffusion(
            encoder,
            network,
            Autoencoder(Identity()) if pixels else vae,
            scheduler(DiffusionProcess("v", "cosine"), "dpm++"),
            steps=3,
            guidance=2.0,
            classes=("cat", "dog", "heart") if stage.classes else (),
        )

    return build


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, dict[str, bytes]], None]:
    """Writes a tar of files by name."""

    def write(path: Path, files: dict[str, bytes]) -> None:
        with tarfile.open(path, "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    return write


@pytest.fixture(scope="session")
def shard(write_tar: Callable[[Path, dict[str, bytes]], None]) -> Callable[[Path, int, str], None]:
    """Writes a WebDataset tar of `count` images, whose captions are a prefix and their number."""

    def write(path: Path, count: int, prefix: str) -> None:
        rng, files = np.random.default_rng([*prefix.encode()]), {}
        for i in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (18, 20, 3), np.uint8)).save(buffer, "PNG")
            files |= {f"{i:03}.png": buffer.getvalue(), f"{i:03}.txt": f"{prefix}{i}".encode()}
        write_tar(path, files)

    return write


@pytest.fixture(scope="session")
def environment(tiny_reads_words: None, flops_counted_once: None) -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}  # the output of a killed process is not lost


def kill_all(process: ScriptProcess) -> None:
    """SIGKILL for a process and all that it started, including those in other sessions, as torchrun's are."""
    for pid in [rank.pid for rank in process.ranks] if isinstance(process, Forked) else [process.pid]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(pid).children(recursive=True):
                child.kill()
    process.kill()
    process.communicate()


@pytest.fixture(scope="session")
def kill() -> Callable[[ScriptProcess], None]:
    return kill_all


@pytest.fixture(scope="session")
def kill_one() -> Callable[[ScriptProcess, int], str]:
    """SIGKILL for a single rank of several; returns what the others printed until they ended."""

    def kill(process: ScriptProcess, rank: int) -> str:
        if isinstance(process, Forked):
            process.ranks[rank].send_signal(signal.SIGKILL)
        else:
            workers = psutil.Process(process.pid).children(recursive=True)
            next(worker for worker in workers if worker.environ().get("RANK") == str(rank)).kill()
        output, _ = process.communicate(timeout=60)
        assert process.returncode
        return output

    return kill


@pytest.fixture
def children() -> Iterator[list[ScriptProcess]]:
    """Processes that end with the test."""
    processes: list[ScriptProcess] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            kill_all(process)


@pytest.fixture
def launch(
    root: Path, environment: dict[str, str], children: list[ScriptProcess], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Forked]:
    """Runs `SCRIPT ARGUMENTS`, or `-m MODULE ARGUMENTS`, in `processes` new processes; `finish` waits for them.

    `more` is added to their environment. They are forks of a server that has imported everything, so they start fast.
    """

    def start(*script: object, processes: int = 1, more: Mapping[str, str] = MappingProxyType({})) -> Forked:
        output = tmp_path_factory.mktemp("outputs") / "output.txt"
        children.append(Forked(script, processes, root, {**environment, **more}, output))
        return children[-1]

    return start


@pytest.fixture
def launch_python(
    root: Path, environment: dict[str, str], children: list[ScriptProcess]
) -> Callable[..., subprocess.Popen[str]]:
    """Starts `python ARGUMENTS`, as a user does; `finish` waits for it."""

    def start(*arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=root,
            env=environment,
            text=True,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        children.append(process)
        return process

    return start


@pytest.fixture(scope="session")
def finish() -> Callable[[ScriptProcess], str]:
    """Waits for a process to succeed, and returns what it printed."""

    def wait(process: ScriptProcess) -> str:
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output[-3000:]
        return output

    return wait


@pytest.fixture(scope="session")
def wait_for() -> Callable[[Path, ScriptProcess], None]:
    """Waits for a file that a process writes."""

    def wait(path: Path, process: ScriptProcess) -> None:
        end = time.monotonic() + 300
        while not path.exists():
            assert process.poll() is None, f"ended before {path} was written: {process.communicate()[0][-3000:]}"
            assert time.monotonic() < end
            time.sleep(0.02)

    return wait


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls the `main` of a command in this process; returns what it printed. `status` is the expected exit status."""

    def run(main: Main, *arguments: object, status: int = 0) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        capsys.readouterr()
        returned = main([*map(str, arguments)])
        output = "".join(capsys.readouterr())
        assert returned == status, output[-3000:]
        return output

    return run


@pytest.fixture
def train(call: Callable[..., str], root: Path) -> Callable[..., str]:
    """Calls train_ldm.py with the tiny configuration, a run's folder and overrides; returns what it printed."""
    import train_ldm

    def run(folder: Path, *more: str, status: int = 0) -> str:
        return call(train_ldm.main, *TINY, f"run.dir={folder}", *more, status=status)

    return run


@pytest.fixture(scope="session")
def tiny_run(
    tmp_path_factory: pytest.TempPathFactory,
    of_all_workers: Path,
    environment: dict[str, str],
    finish: Callable[[ScriptProcess], str],
) -> Path:
    """The folder of an uninterrupted run of the tiny configuration: a worker's own copy of what one of them trained.

    Another run whose `data.cache_dir` is this one's `cache` needs to render no images and encode no captions.
    """
    original, folder = of_all_workers / "tiny", tmp_path_factory.mktemp("runs") / "tiny"
    with FileLock(of_all_workers / "tiny.lock"):
        if not (original / "pipeline").exists():
            command = ["train_ldm.py", *TINY, f"run.dir={original}", "run.preflight=true"]
            finish(Forked(command, 1, ROOT, environment, folder.parent / "output.txt"))
    shutil.copytree(original, folder)
    return folder

"""Bad command lines: one clear line, exit status 2, nothing lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import TINY, WORDS

import train_ldm


def refused(capsys: pytest.CaptureFixture[str], status: int) -> str:
    message = capsys.readouterr().err
    assert status == 2
    assert message.startswith("error: ")
    assert message.count("\n") == 1, message
    return message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage2.stepz=3"], "did you mean 'steps'"),
        (["stage2.lr=fast"], "stage2.lr: 'fast'"),
        (["data.size=33"], "33 is not a multiple of 2"),
        (["data.source=openmoji-dmeo"], "did you mean 'openmoji-demo'"),
        (["stage2.lr=-1"], "stage2.lr: -1"),
        (["sample.prompts=['']"], "empty prompt"),
        (["stage1.pretrained=/nowhere"], "stage1.pretrained"),
        (["run.dir=/dev/null/run"], "can't write"),
        (["--stage", "2"], "run --stage 1 first"),
        (["run.precision=fp16", "run.device=cpu"], "run.precision: fp16 needs a GPU"),
        (["run.tracker=tensorbord"], "did you mean 'tensorboard'"),
        (["stage1.betas=[0.9, 1.5]"], "stage1.betas.1: 1.5"),
        (["stage2.batch=24", "stage2.micro_batches=5"], "5 equal parts of stage2.batch, 24"),
        (["text.model=/nowhere"], "text.model: '/nowhere'"),
        (["text.max_tokens=1000"], "text.max_tokens: 1000"),
        (["stage2.init_from=/nowhere"], "stage2.init_from"),
        (["stage2.attention_backend=xformers"], "xformers needs a GPU"),
        (["data.cache_dir=/dev/null/cache"], "data.cache_dir: can't write"),
        (["--stage", "3"], "invalid choice"),
        (["--stages", "1"], "unrecognized arguments"),
    ],
)
def test_training_names_the_mistake(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    tiny = ["--config", str(root / "configs/tiny.yaml"), f"text.model=${WORDS}"]
    arguments = [*tiny, f"run.dir={tmp_path / 'run'}", *overrides]
    assert message in refused(capsys, train_ldm.main(arguments))
    assert not list((tmp_path / "run").glob("*/checkpoints"))  # nothing was trained before the mistake was named


def test_options_and_overrides_come_in_any_order(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "stage1.steps=7",
        "--config",
        str(root / "configs/tiny.yaml"),
        "--dry-run",
        "stage2.steps=9",
        f"run.dir={tmp_path}",
        f"data.source={tmp_path / 'none'}",
    ]
    assert train_ldm.main(arguments) == 0
    plan = capsys.readouterr().out
    assert "7 steps of 16" in plan
    assert "9 steps of 16" in plan
    assert "not measured: data.source" in plan


def test_a_missing_configuration_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no file configs/none.yaml" in refused(capsys, train_ldm.main(["--config", "configs/none.yaml"]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; /dev/null/run above covers it")
def test_a_folder_without_permission_is_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    status = train_ldm.main(["--config", str(root / "configs/tiny.yaml"), f"run.dir={tmp_path / 'run'}"])
    assert "can't write" in refused(capsys, status)


@pytest.mark.slow
def test_the_folder_of_another_configuration_is_refused_with_the_keys(
    root: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, f"run.dir={tiny_run}", "stage2.batch=32"]
    assert "stage2.batch: 8 → 32" in refused(capsys, train_ldm.main(arguments))


@pytest.mark.slow
def test_a_loaded_autoencoder_of_other_channels_is_refused(
    root: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--config",
        str(root / "configs/tiny.yaml"),
        f"run.dir={tmp_path / 'run'}",
        f"stage1.pretrained={tiny_run / 'autoencoder'}",
        "stage1.latent_channels=8",
    ]
    assert "stage1.latent_channels: 8, but" in refused(capsys, train_ldm.main(arguments))


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        pytest.param("openmoji", marks=pytest.mark.drill),  # a block of the data guide, which test_docs runs
        pytest.param("sd-512", marks=pytest.mark.drill),  # test_memory_estimate
        pytest.param("sdxl-1024", marks=pytest.mark.drill),  # half a minute
    ],
)
def test_a_dry_run_prints_the_plan_of_any_configuration(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    three_shapes: Callable[[list[str]], Path],
) -> None:
    arguments = ["--config", str(root / f"configs/{name}.yaml"), "--dry-run", f"run.dir={tmp_path / 'run'}"]
    if name == "tiny":  # test_preflight measures it
        arguments.append(f"data.source={tmp_path / 'none'}")
    if name == "openmoji":  # its models at their size try a step
        arguments += [f"data.source={three_shapes(['cat', 'dog', 'heart'])}", "stage1.batch=2", "stage2.batch=2"]
    assert train_ldm.main(arguments) == 0
    plan = capsys.readouterr().out
    assert "U-Net," in plan
    assert "autoencoder," in plan
    assert not (tmp_path / "run").exists()

"""Prior preservation: images of the class are drawn once, and each one's loss counts `finetune.prior_weight`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from forked import ScriptProcess
from of_config import images_of, indexed
from PIL import Image
from safetensors.torch import load_file, save_file
from sdxl import sdxl
from stable_diffusion import stable_diffusion
from tiny import TINY

from ldm.config import loader
from ldm.config.schema import Config
from ldm.data.index_report import stop_reason
from ldm.models import text_encoder
from ldm.training.metrics_logger import MetricsLogger
from ldm.utils.errors import UserError
from stage2_diffusion.finetune import prior

PROMPT = "a photo of a dog"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline of the layout of Stable Diffusion 1."""
    folder = tmp_path_factory.mktemp("base")
    stable_diffusion(folder, linear=False).save_pretrained(folder / "base")
    return folder / "base"


def write_images(folder: Path, count: int, first: int = 0) -> Path:
    rng = np.random.default_rng(first)
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def overrides(base: Path, tmp_path: Path, *more: str) -> list[str]:
    """Fine-tuning of the pipeline on three images of the subject, which are written where they are missing."""
    if not (tmp_path / "sks").exists():
        write_images(tmp_path / "sks", 3)
    return [
        f"data.source={tmp_path / 'sks'}",
        "data.source.caption=a photo of sks dog",
        f"data.cache_dir={tmp_path / 'cache'}",
        *(f"{key}={base}" for key in ("stage1.pretrained", "stage2.init_from", "text.model")),
        "stage1.channels=[8, 8]",
        "data.size=16",
        "stage2.prediction_type=eps",
        "stage2.batch=4",
        "stage2.steps=2",
        "text.max_tokens=null",
        "sample.prompts=[]",
        "sample.steps=2",
        "run.log_every=1",
        "run.precision=no",
        "run.tracker=none",
        "finetune.prior_weight=0.25",
        f"finetune.class_prompt={PROMPT}",
        *more,
    ]


@pytest.fixture
def settings(root: Path, base: Path, tmp_path: Path) -> Callable[..., Config]:
    def load(*more: str, base: Path = base) -> Config:
        keys = [f"run.dir={tmp_path / 'run'}", *overrides(base, tmp_path, *more)]
        return loader.load(root / "configs/tiny.yaml", keys)

    return load


# ------------------------------------------------------------------------------------------------------------ the loss


def test_the_gradient_of_a_batch_is_the_weighted_sum_of_its_samples_gradients() -> None:
    torch.manual_seed(0)
    x, y, theta = torch.randn(5, 3), torch.randn(5), torch.randn(3, requires_grad=True)
    per_sample = [torch.autograd.grad((x[i] @ theta - y[i]) ** 2, theta)[0] for i in range(5)]
    for k in range(6):  # images of the class, an uneven number too
        batch = {"prior": torch.arange(5) < k}
        losses = (x @ theta - y) ** 2
        gradient = torch.autograd.grad((prior.sample_weights(batch, 0.3) * losses).mean(), theta)[0]
        expected = sum((0.3 if i < k else 1.0) * per_sample[i] for i in range(5)) / 5
        torch.testing.assert_close(gradient, expected)


def test_a_batch_without_the_key_is_neither_weighted_nor_logged() -> None:
    assert prior.sample_weights({}, None) == 1.0
    assert prior.loss_metrics({}, torch.ones(2)) == {}


def test_each_kinds_loss_is_the_mean_over_its_samples_however_many_a_batch_has(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path / "metrics.jsonl", Accelerator(cpu=True))
    batches = [([True, False, False], [7.0, 1.0, 2.0]), ([False] * 3, [3.0, 4.0, 5.0])]
    logger.add(prior.loss_metrics({"prior": torch.tensor(kinds)}, torch.tensor(losses)) for kinds, losses in batches)
    assert logger.pop_means() == {"loss_prior": 7.0, "loss_subject": 3.0, "prior_share": pytest.approx(1 / 6)}
    logger.add([prior.loss_metrics({"prior": torch.tensor([False])}, torch.tensor([2.0]))])
    assert logger.pop_means() == {"loss_subject": 2.0, "prior_share": 0.0}


@pytest.mark.slow
def test_a_run_draws_its_class_images_and_logs_both_losses(
    base: Path, tmp_path: Path, train: Callable[..., str]
) -> None:
    keys = overrides(base, tmp_path, "finetune.num_class_images=5")
    dry = train(tmp_path / "run", *keys, "sample.prompts=[a dog]", "--dry-run")
    assert re.search(rf"class +5 images of '{PROMPT}' would be drawn with the base model, in about .* s\n", dry)
    assert not (tmp_path / "cache/class-images").exists()

    output = train(tmp_path / "run", *keys)
    assert f"drawing 5 images of '{PROMPT}'" in output
    assert "images     8 good" in output
    check_losses(tmp_path / "run")
    assert (tmp_path / "run/pipeline").exists()

    assert "finished" in train(tmp_path / "run", *keys)  # its data are compared with those that it was trained on


def check_losses(run: Path) -> list[float]:
    """The losses of a run's two steps, each of which is made up of both kinds' losses."""
    lines = [json.loads(line) for line in (run / "stage2/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        assert line["prior_share"] == 0.5
        assert line["loss"] == pytest.approx((line["loss_subject"] + 0.25 * line["loss_prior"]) / 2, rel=1e-5)
    return [line["loss"] for line in lines]


@pytest.mark.slow
@pytest.mark.drill
def test_two_processes_draw_the_same_class_images_and_have_the_same_losses(
    base: Path,
    tmp_path: Path,
    train: Callable[..., str],
    launch: Callable[..., ScriptProcess],
    finish: Callable[[ScriptProcess], str],
) -> None:
    keys = overrides(base, tmp_path, "finetune.num_class_images=5", "finetune.kind=lora")
    train(tmp_path / "single", *keys, f"data.cache_dir={tmp_path / 'one'}")
    more = [f"run.dir={tmp_path / 'pair'}", f"data.cache_dir={tmp_path / 'two'}"]
    finish(launch("train_ldm.py", *TINY, *keys, *more, processes=2))
    images = [
        {path.name: path.read_bytes() for path in (tmp_path / cache / prior.FOLDER).rglob("*.png")}
        for cache in ("one", "two")
    ]
    assert len(images[0]) == 5
    assert images[0] == images[1]
    assert check_losses(tmp_path / "pair") == pytest.approx(check_losses(tmp_path / "single"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.drill
def test_sdxl_draws_its_class_and_trains_on_it_with_sizes(tmp_path: Path, train: Callable[..., str]) -> None:
    sdxl(tmp_path).save_pretrained(tmp_path / "sdxl")
    keys = overrides(tmp_path / "sdxl", tmp_path, "finetune.num_class_images=3", "stage2.conditions=[text, size]")
    assert f"drawing 3 images of '{PROMPT}'" in train(tmp_path / "run", *keys)
    check_losses(tmp_path / "run")
    sizes = {Image.open(path).size for path in (tmp_path / "cache" / prior.FOLDER).rglob("*.png")}
    assert sizes == {(16, 16)}


# ---------------------------------------------------------------------------------------------------------- the images


def drawn(config: Config) -> tuple[Path, dict[str, bytes]]:
    """The folder of the class's images, and their bytes."""
    source = prior.with_class_images(config, text_encoder.of(config.text)).data.source[-1]
    assert source.prior
    assert (source.caption, source.limit) == (config.finetune.class_prompt, config.finetune.num_class_images)
    return Path(source.path), {path.name: path.read_bytes() for path in sorted(Path(source.path).glob("*.png"))}


def test_images_are_drawn_once_and_a_killed_drawing_goes_on_with_the_same_bytes(
    settings: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings("finetune.num_class_images=6")
    folder, images = drawn(config)
    assert [*images] == [f"{i:05}.png" for i in range(6)]
    assert len(set(images.values())) == 6
    assert "drawing 6 images" in capsys.readouterr().out
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert drawn(config) == drawn(settings("finetune.num_class_images=6", "run.dir=elsewhere")) == (folder, images)

    fewer = settings("finetune.num_class_images=4")
    assert drawn(fewer) == (folder, images)
    assert "drawing" not in capsys.readouterr().out
    assert written == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    index = indexed(prior.with_class_images(fewer, text_encoder.of(fewer.text)))
    assert [entry.key for entry in index.select("prior")] == [f"1:{i:05}.png" for i in range(4)]

    for name in ("00001.png", "00005.png"):  # as if it had been killed, while it wrote one
        (folder / name).rename(folder / f".{name}.partial")
    assert drawn(config) == (folder, images)
    assert (
        "drawing 6 images of 'a photo of a dog' with the base model; 2 of them are missing" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["data.max_bad=0.2"], r"1 of 4 images are bad, .* see .*data-report\.json\. The first: cut\.png"),
        (["finetune.kind=inversion", "finetune.token=<x>", "finetune.initializer=a"], "no caption has <x>"),
    ],
)
def test_the_subjects_images_are_checked_before_those_of_the_class_are_drawn(
    keys: list[str], message: str, settings: Callable[..., Config], tmp_path: Path
) -> None:
    config = settings("finetune.num_class_images=1", "data.max_bad=0.5", *keys)
    (tmp_path / "sks/cut.png").write_bytes((tmp_path / "sks/0.png").read_bytes()[:99])
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=message):
        drawn(config)
    assert not (tmp_path / "cache/class-images").exists()


def test_other_weights_prompts_and_seeds_draw_other_images(
    settings: Callable[..., Config], base: Path, tmp_path: Path
) -> None:
    few = "finetune.num_class_images=1"

    def depends_on(folder: Path) -> dict[str, object]:
        config = settings(few, base=folder)
        return prior._settings(config, prior._base_model(config, text_encoder.of(config.text)))

    shutil.copytree(base, tmp_path / "changed")
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        file = tmp_path / f"changed/{part}.safetensors"
        tensors = load_file(file)
        name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
        save_file({**tensors, name: tensors[name] + 1}, file, {"format": "pt"})
    same, changed = depends_on(base), depends_on(tmp_path / "changed")
    assert [key for key in same if changed[key] != same[key]] == ["unet", "autoencoder", "text"]

    folder, images = drawn(settings(few))
    for more in ("finetune.class_prompt=a cat", "run.seed=1", "sample.guidance=1"):
        other, other_images = drawn(settings(few, more))
        assert other != folder
        assert other_images["00000.png"] != images["00000.png"], more


def test_a_folder_of_class_images_is_held_out_of_validation_and_alternates(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    folder = write_images(tmp_path / "dogs", 4, first=9)
    (folder / "2.txt").write_text("a photo of a small dog")
    config = settings(f"finetune.class_images={folder}", "data.val_fraction=0.4")
    index = indexed(prior.with_class_images(config, None))
    of_class = [entry.captions[0] for entry in index.select("prior")]
    assert of_class == [PROMPT, PROMPT, "a photo of a small dog", PROMPT]
    assert len(index.select("train")) + len(index.select("reconstruction")) == 3
    samples = images_of(index.select("train", "prior"), config, 4)
    for n in range(16):
        assert bool(samples[n]["prior"]) == (samples[n]["caption"] != "a photo of sks dog") == bool(n % 2)
    assert "prior" not in images_of(index.select("train"), config, 4)[0]
    assert index.select("train").fingerprint() == indexed(config).select("train").fingerprint()


def test_a_caption_that_subject_and_class_share_is_named(
    settings: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = f"finetune.class_images={write_images(tmp_path / 'dogs', 1, first=9)}"
    for prompt, warned in ((PROMPT, False), ("a photo of sks dog", True)):
        config = settings(folder, f"finetune.class_prompt={prompt}")
        prior.warn_of_shared_captions(indexed(prior.with_class_images(config, None)))
        line = "finetune.class_prompt: 'a photo of sks dog' captions images of the subject too"
        assert (line in capsys.readouterr().err) is warned


KOHYA = "[[datasets]]\nresolution = 16\n[[datasets.subsets]]\nimage_dir = 'sks'\nclass_tokens = 'sks dog'\n"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["finetune.class_prompt=''"], "finetune.class_prompt: missing; give the caption of the class"),
        (["finetune.prior_weight=null"], "finetune.class_prompt: is of prior preservation; set prior_weight"),
        (["data.streaming=true", "data.cache=none"], "finetune.prior_weight: .*no data.streaming"),
        (
            ["stage2.conditions=[]", "stage2.pooled_text=false"],
            "finetune.prior_weight: the subject and its class differ by captions; add text",
        ),
        (["stage2.init_from=null"], "stage2.init_from: no model to draw the class with; name one, or give"),
        (["stage2.conditions=[text, inpaint]"], "finetune.class_images: missing; only a model conditioned on text"),
        (["finetune.class_images={}/none"], "finetune.class_images: no folder .*none; put images"),
        (["finetune.class_images={}/empty"], "finetune.class_images: no image in .*empty; add some"),
        (["finetune.class_images={}/sks"], "finetune.class_images: .*sks and data.source, .*sks, overlap"),
        (["finetune.class_images={}"], "finetune.class_images: .* and data.source, .*sks, overlap"),
        (["finetune.class_images={}/sks", "finetune.num_class_images=3"], "num_class_images: counts images that are"),
        (
            ["data.source.prior=true", "finetune.prior_weight=null", "finetune.class_prompt=''"],
            "data.source.prior: is of",
        ),
        (["data.source={}/set.toml", "data.source.caption=''", "finetune.class_prompt=''"], "no subset .* has is_reg"),
    ],
)
def test_what_prior_preservation_lacks_is_named(
    keys: list[str], message: str, settings: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "set.toml").write_text(KOHYA)
    with pytest.raises(UserError, match=message):
        prior.check(settings(*(key.format(tmp_path) for key in keys)))


def test_only_images_of_the_class_are_refused(settings: Callable[..., Config], tmp_path: Path) -> None:
    index = indexed(settings("data.source.prior=true"))
    assert stop_reason(index, tmp_path / "report.json").endswith(
        "has only images of the class; add those of the subject"
    )


def test_regularization_images_of_kohya_are_images_of_the_class_where_they_get_a_weight(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    write_images(tmp_path / "reg", 7, first=5)
    (tmp_path / "set.toml").write_text(
        KOHYA + "[[datasets.subsets]]\nimage_dir = 'reg'\nclass_tokens = 'dog'\nis_reg = true\n"
    )
    kohya = (f"data.source={tmp_path / 'set.toml'}", "data.source.caption=''", "finetune.class_prompt=''")
    config = settings(*kohya)
    prior.check(config)
    index = indexed(prior.with_class_images(config, None))
    assert [len(index.select(split)) for split in ("train", "prior")] == [3, 7]
    samples = images_of(index, config, 4)
    assert [(bool(samples[n]["prior"]), samples[n]["caption"]) for n in range(4)] == [
        (False, "sks dog"),
        (True, "dog"),
    ] * 2
    assert loader.parse(loader.dump(config), "a test") == config

    plain = indexed(settings(*kohya, "finetune.prior_weight=null"))  # as before
    assert plain.column("split").tolist() == ["train"] * 6
    assert plain.column("repeats").tolist() == [1] * 6

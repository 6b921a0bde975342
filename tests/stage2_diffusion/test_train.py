"""Stage two on a handful of images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked, ScriptProcess, of_accelerate
from metrics_lines import MEASURED
from safetensors.torch import load_file

from ldm.config.schema import Config
from ldm.data.index import Index
from ldm.models import text_encoder
from ldm.models.autoencoder import Autoencoder
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.checkpoint import checkpoints, read_checkpoint
from ldm.utils.rng import uniform
from stage2_diffusion.train import train

DIFFUSERS_PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}
Few = Callable[..., tuple[Config, Index]]
pytestmark = pytest.mark.usefixtures("two_noise_levels")


def encoder_of(settings: Config) -> text_encoder.TextEncoder:
    return text_encoder.of(settings.text)


def tensors(module: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in module.state_dict().items()}


def lines(folder: Path, key: str = "loss") -> list[dict[str, float]]:
    logged = map(json.loads, (folder / "stage2/metrics.jsonl").read_text().splitlines())
    return [line for line in logged if key in line]


def last_checkpoint(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    return read_checkpoint(checkpoints(folder / "stage2")[-1])


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, marks=() if target in ("v", "flow") else pytest.mark.drill)
        for target in DIFFUSERS_PREDICTION_TYPES
    ],
)
def test_every_target_is_learned_and_named_in_the_export(
    tmp_path: Path, target: str, drawings: Callable[..., tuple[Config, Index]], vae: Autoencoder, words: Path
) -> None:
    settings, index = drawings(
        f"stage2.prediction_type={target}",
        "stage2.steps=30",
        "stage2.channels=[8, 16]",
        "stage2.norm_num_groups=4",
        f"text.model={words}",
        "stage2.beta_schedule=cosine",
        "sample.prompts=[]",
    )
    images = index.select("train").first(8)
    train(settings, images, vae, text_encoder.load(settings.text.model, settings.text.max_tokens))
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]
    model = LatentDiffusion.load(tmp_path / "run/pipeline")
    assert model.scheduler.config.prediction_type == DIFFUSERS_PREDICTION_TYPES[target]
    assert model(images[0].captions[0], num_inference_steps=4, guidance_scale=2.0)[0].size == (16, 16)


TASKS = [
    ("[]", ()),
    ("[class]", ()),
    ("[class]", ("stage2.variance=learned", "sample.solver=ddpm", "stage2.prediction_type=eps")),
    ("[text, class]", ("stage2.init_from=ITSELF",)),
    ("[text, upscale]", ()),
    ("[text, upscale]", ("stage2.variance=learned", "sample.solver=ddpm", "stage2.prediction_type=eps")),
    ("[text, inpaint]", ("stage2.pooled_text=true",)),
    ("[text, class, size, inpaint]", ("text.train=true", "stage2.uncond_embedding=learned")),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("conditions", "more", "cache"),
    [
        pytest.param(*task, cache, marks=pytest.mark.drill if (i + j) % 2 else ())  # with one of both each
        for i, task in enumerate(TASKS)
        for j, cache in enumerate(("disk", "none"))
    ],
)
def test_every_task_is_trained_shown_measured_and_exported(
    conditions: str, more: tuple[str, ...], cache: str, few: Few, vae: Autoencoder, tmp_path: Path
) -> None:
    keys = [f"stage2.conditions={conditions}", f"data.cache={cache}", "sample.prompts=[red heart]"]
    for start in (None, str(tmp_path / "run/pipeline")) if "stage2.init_from=ITSELF" in more else (None,):
        own = [key.replace("ITSELF", str(start)) for key in more if start or "ITSELF" not in key]
        settings, index = few(*keys, *own, f"run.dir={tmp_path / ('again' if start else 'run')}")
        encoder = encoder_of(settings) if settings.stage2.text else None
        train(settings, index, vae, encoder)
        folder = settings.run.dir
        assert (folder / "stage2/samples/step-000003.png").exists()
        assert lines(folder, "held_out_loss")[-1]["step"] == 3
        model = LatentDiffusion.load(folder / "pipeline", "cpu")
        assert model.task == next((task for task in ("inpaint", "upscale") if task in conditions), "generate")
        assert list(model.classes) == (index.select("train").labels() if settings.stage2.classes else [])
        assert torch.isfinite(model.unet.conv_out.weight).all()


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_nothing_reaches_a_frozen_autoencoder_or_text_encoder(few: Few, vae: Autoencoder, cache: str) -> None:
    settings, index = few(f"data.cache={cache}", "stage2.conditions=[text, inpaint]", "stage2.uncond_embedding=learned")
    encoder = encoder_of(settings)
    before = tensors(vae.vae), tensors(encoder.model)
    train(settings, index, vae, encoder)
    assert (tensors(vae.vae), tensors(encoder.model)) == before
    for parameter in (*vae.vae.parameters(), *encoder.model.parameters()):
        assert not parameter.requires_grad
        assert parameter.grad is None


@pytest.mark.slow
def test_a_text_encoder_is_trained_averaged_and_exported_and_no_embedding_is_kept(
    tmp_path: Path, few: Few, vae: Autoencoder, drawn: Path
) -> None:
    few()  # renders the drawings, if no other test has
    cache = tmp_path / "own cache"
    cache.mkdir()
    (cache / "openmoji-demo-16px").symlink_to(drawn / "openmoji-demo-16px")
    settings, index = few("text.train=true", f"data.cache_dir={cache}", "sample.prompts=[red heart]")
    encoder = encoder_of(settings)
    before, frozen, dropped_out = tensors(encoder.model), tensors(vae.vae), list[bool]()
    encoder.model.register_forward_pre_hook(lambda m, _: dropped_out.append(any(part.training for part in m.modules())))
    train(settings, index, vae, encoder)
    assert len(dropped_out) > settings.stage2.steps
    assert not any(dropped_out)
    assert tensors(vae.vae) == frozen
    exported, live = tensors(LatentDiffusion.load(tmp_path / "run/pipeline", "cpu").text.model), tensors(encoder.model)
    unchanged = {name for name, value in before.items() if live[name] == value}
    assert unchanged == {name for name in before if name.startswith("pooler.")}
    for name, value in before.items():
        assert exported[name] == live[name], name  # which has the average, once the run is over
        assert (exported[name] == value) == (name in unchanged), name
    assert (cache / "latents").is_dir()
    assert not (cache / "text").exists()
    settings, _ = few("text.train=false", f"data.cache_dir={cache}", f"run.dir={tmp_path / 'frozen'}")
    train(settings, index, vae, encoder_of(settings))
    assert (cache / "text").is_dir()  # where embeddings would be


def test_the_exported_text_encoder_has_the_average_of_the_checkpoint(
    tmp_path: Path, few: Few, vae: Autoencoder
) -> None:
    settings, index = few("text.train=true")
    encoder = encoder_of(settings)
    train(settings, index, vae, encoder)
    trained = [name for name, parameter in encoder.model.named_parameters() if parameter.requires_grad]
    parts, _ = last_checkpoint(tmp_path / "run")
    exported = load_file(tmp_path / "run/pipeline/text_encoder/model.safetensors")
    for name in trained:
        assert torch.equal(exported[name], parts["ema"][f"encoder.{name}"]), name


def test_a_learned_null_embedding_is_trained_exported_and_what_guidance_turns_away_from(
    tmp_path: Path, few: Few, vae: Autoencoder
) -> None:
    settings, index = few("stage2.uncond_embedding=learned", "stage2.cond_dropout=0.5", "stage2.ema_decay=0")
    encoder = encoder_of(settings)
    empty = encoder.encode([text_encoder.NULL_PROMPT])[0]
    train(settings, index, vae, encoder)
    parts, _ = last_checkpoint(tmp_path / "run")
    model = LatentDiffusion.load(tmp_path / "run/pipeline", "cpu")
    assert model.null is not None
    torch.testing.assert_close(model.null, parts["model"]["null"], rtol=1e-6, atol=0)
    assert not torch.allclose(model.null, empty, atol=1e-3)

    def latents(model: LatentDiffusion, guidance: float) -> torch.Tensor:
        return model.latents(["red heart"], [0], Sampling(guidance_scale=guidance))

    with_empty_prompt = replace(model, null=None)
    assert torch.equal(latents(model, 1.0), latents(with_empty_prompt, 1.0))
    assert not torch.allclose(latents(model, 5.0), latents(with_empty_prompt, 5.0))
    assert torch.equal(latents(replace(model, null=empty), 5.0), latents(with_empty_prompt, 5.0))


@pytest.mark.parametrize("dropout_each", [False, True])
def test_the_logged_dropout_rate_is_that_of_the_positions(
    few: Few, vae: Autoencoder, tmp_path: Path, dropout_each: bool
) -> None:
    settings, index = few(
        "stage2.conditions=[text, class]",
        "stage2.cond_dropout=0.4",
        f"stage2.dropout_each={dropout_each}".lower(),
        "stage2.device_batch=4",
        "run.log_every=2",
        "stage2.steps=4",
    )
    train(settings, index, vae, encoder_of(settings))
    names = {"dropped": "dropout", "dropped_class": "class dropout"} if dropout_each else {"dropped": "dropout"}
    for line, start in zip(lines(tmp_path / "run"), (0, 16), strict=True):
        assert {name for name in line if name.startswith("dropped")} == names.keys()
        for name, stream in names.items():
            expected = (uniform(0, stream, range(start, start + 16)) < 0.4).float().mean()
            assert line[name] == pytest.approx(float(expected), abs=1e-6)


RUNS = {
    "all that is learned besides the U-Net": (
        "text.train=true",
        "stage2.uncond_embedding=learned",
        "stage2.loss_weighting=learned",
        "stage2.conditions=[text, class]",
        "stage2.stratified=true",
    ),
    "a learned schedule": ("stage2.process=variational",),
    "times by their loss": (
        "stage2.timestep_sampling=loss",
        "stage2.timesteps=2",
        "stage2.device_batch=8",
        "stage2.prediction_type=v",
        "stage2.batch=16",
    ),
    "recomputed activations of pixels": (
        "stage2.conditions=[]",
        "stage2.gradient_checkpointing=true",
        "stage2.device_batch=4",
        "stage2.attention_head_dim=4",
        "stage2.attention=[true, false]",
    ),
}

LAYOUTS = {
    "normalized token states": ("text.normalize=true",),
    "channels last": ("stage2.channels_last=true", "stage2.attention=[false, true]"),
    "channels last, of pixels": (
        "stage2.channels_last=true",
        "stage2.conditions=[]",
        "stage2.attention=[true, false]",
        "stage2.attention_head_dim=4",
    ),
    "recomputed activations": (
        "stage2.channels_last=true",
        "stage2.gradient_checkpointing=true",
        "stage2.attention=[true, true]",
        "stage2.device_batch=4",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(keys, id=name, marks=pytest.mark.drill if name in ("channels last", *list(LAYOUTS)[3:]) else ())
        for name, keys in {**RUNS, **LAYOUTS}.items()
    ],
)
def test_resumed_equals_uninterrupted(few: Few, vae: Autoencoder, tmp_path: Path, keys: tuple[str, ...]) -> None:
    folders = tmp_path / "uninterrupted", tmp_path / "resumed"
    for folder, steps in ((folders[0], 6), (folders[1], 3), (folders[1], 6)):
        settings, index = few(*keys, f"run.dir={folder}", f"stage2.steps={steps}", "stage2.checkpoint_every=3")
        train(settings, index, vae, encoder_of(settings) if settings.stage2.text else None)
    (expected, expected_state), (resumed, state) = map(last_checkpoint, folders)
    assert {**state, "metrics_bytes": None} == {
        **expected_state,
        "metrics_bytes": None,
    }  # times have more digits or fewer
    for part, values in expected.items():
        assert values.keys() == resumed[part].keys()
        assert all(torch.equal(value, resumed[part][name]) for name, value in values.items()), part
    losses = [[line["loss"] for line in lines(folder)] for folder in folders]
    assert losses[0] == losses[1]
    if settings.stage2.timestep_sampling == "loss":
        assert int(expected["model"]["times.counts"].sum()) == 6 * settings.stage2.batch
        assert expected["model"]["times.losses"].unique().numel() > 10  # as many as are kept, of each of two times


ALL_LEARNED = "all that is learned besides the U-Net"
TWO_PROCESSES = {"ddp": tuple(RUNS), "fsdp": (ALL_LEARNED,)}


@pytest.fixture(scope="module")
def train_exactly(
    root: Path, environment: dict[str, str], finish: Callable[[ScriptProcess], str], small: list[str]
) -> Callable[[Path, Mapping[str, Sequence[str]]], None]:
    """Trains runs, given as overrides by name, in FOLDER: in a single process, or as its name tells in two."""
    shared = [*small, "stage2.evaluate_images=6", "stage2.evaluate_every=2", "stage2.steps=4"]

    def train_runs(folder: Path, runs: Mapping[str, Sequence[str]]) -> None:
        world = 2 if folder.name in TWO_PROCESSES else 1
        script = ["tests/stage2_diffusion/exactly.py", world, folder, json.dumps(runs), json.dumps(shared)]
        fsdp = of_accelerate(root / "configs/accelerate/fsdp.yaml") if folder.name == "fsdp" else {}
        finish(Forked(script, world, root, environment | fsdp, folder.with_suffix(".txt")))

    return train_runs


@pytest.fixture(scope="module")
def trained(train_exactly: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the RUNS that a single process trained, and two with DDP; and one that FSDP began.

    What FSDP trained for two of four steps is continued by FSDP, DDP and a single process; by the first in the same
    processes, because those that shard take seconds to begin.
    """
    folder = tmp_path_factory.mktemp("processes")
    whole = RUNS[ALL_LEARNED]
    train_exactly(folder / "fsdp", {"half": (*whole, "stage2.steps=2"), ALL_LEARNED: ("after=half", *whole)})
    for name in ("single", "ddp"):
        shutil.copytree(folder / "fsdp/half", folder / name / "half")
        train_exactly(folder / name, {**RUNS, "half": RUNS[ALL_LEARNED]})
    return folder


def assert_close(run: Path, expected: Path) -> None:
    (parts, _), (expected_parts, _) = map(last_checkpoint, (run, expected))
    assert parts.keys() == expected_parts.keys()
    for part, values in expected_parts.items():
        assert values.keys() == parts[part].keys()
        for key, value in values.items():
            torch.testing.assert_close(parts[part][key], value, rtol=1e-5, atol=1e-7, msg=f"{run} {part} {key}")


@pytest.mark.slow
@pytest.mark.parametrize("processes", TWO_PROCESSES)
def test_two_processes_train_and_validate_as_a_single_one_does(trained: Path, processes: str) -> None:
    assert_equal_runs(trained, processes, TWO_PROCESSES[processes])


def assert_equal_runs(trained: Path, processes: str, names: Iterable[str]) -> None:
    for name in names:
        single, run = trained / "single" / name, trained / processes / name
        assert_close(run, single)
        for key in ("loss", "held_out_loss"):
            expected = lines(single, key)
            assert len(expected) == (4 if key == "loss" else 2)
            for a, b in zip(expected, lines(run, key), strict=True):
                assert {k: v for k, v in b.items() if k not in MEASURED} == pytest.approx(
                    {k: v for k, v in a.items() if k not in MEASURED}, rel=1e-5
                )
        exported = [load_file(path / "pipeline/unet/diffusion_pytorch_model.safetensors") for path in (single, run)]
        for key, value in exported[0].items():
            torch.testing.assert_close(exported[1][key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_fsdp_gives_each_process_half_of_the_weights(trained: Path) -> None:
    for processes, share in (("ddp", 1.0), ("fsdp", 0.5)):
        for rank in (0, 1):
            shares = json.loads((trained / processes / f"shares-{rank}.json").read_text())
            assert shares.keys() >= set(TWO_PROCESSES[processes])
            assert list(shares.values()) == pytest.approx([share] * len(shares), abs=0.05), processes


@pytest.mark.slow
def test_a_run_resumes_sharded_or_not(trained: Path) -> None:
    for processes in ("single", "ddp"):
        assert last_checkpoint(trained / processes / "half")[1]["step"] == 4
        assert_close(trained / processes / "half", trained / "single" / ALL_LEARNED)


@pytest.mark.slow
@pytest.mark.drill
def test_fsdp_trains_every_run_as_a_single_process_does(trained: Path, train_exactly: Callable[..., None]) -> None:
    names = RUNS.keys() - TWO_PROCESSES["fsdp"]
    train_exactly(trained / "fsdp", {**{name: RUNS[name] for name in names}, "uninterrupted": RUNS[ALL_LEARNED]})
    assert_equal_runs(trained, "fsdp", names)
    for part, values in last_checkpoint(trained / "fsdp/uninterrupted")[0].items():
        resumed = last_checkpoint(trained / "fsdp" / ALL_LEARNED)[0][part]
        assert values.keys() == resumed.keys()
        assert all(torch.equal(resumed[key], value) for key, value in values.items())

"""Models for each task, with random weights: saved, loaded, and opened by plain diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ldm.diffusion.process import DiffusionProcess
from ldm.sampling.loop import initial_noise
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.solvers import scheduler
from ldm.utils.errors import UserError

Make = Callable[[str], LatentDiffusion]
TASKS: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "pixels": ((), "DDPMPipeline", {"count": 2}),
    "unconditional": ((), "LDMPipeline", {"count": 2}),
    "class": (("class",), "LDMPipeline", {"labels": ["dog", "cat"]}),
    "text and class": (("text", "class"), "StableDiffusionPipeline", {"prompts": ["a", "b"], "labels": ["dog", 2]}),
    "sizes": (("text", "size"), "StableDiffusionPipeline", {"prompts": ["a", "b"]}),
    "inpaint": (("text", "inpaint"), "StableDiffusionInpaintPipeline", {"prompts": ["a", "b"]}),
    "upscale": (("text", "upscale"), "StableDiffusionUpscalePipeline", {"prompts": ["a", "b"]}),
}


def picture(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(side).integers(0, 255, (side, side, 3), np.uint8))


def hole() -> Image.Image:
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 6:] = 255
    mask[10:, :4] = 150  # light grey counts as white, as in diffusers
    mask[:2] = 100
    return Image.fromarray(mask)


GIVEN = {"inpaint": {"image": picture(16), "mask": hole()}, "upscale": {"image": picture(8)}}


@pytest.fixture
def make(random_model: Callable[..., LatentDiffusion]) -> Make:
    return lambda task: random_model(*TASKS[task][0], pixels=task == "pixels")


def arrays(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(each).astype(int) for each in pictures])


@pytest.mark.parametrize("task", TASKS)
def test_a_saved_model_makes_the_same_pictures_and_diffusers_opens_it(task: str, make: Make, tmp_path: Path) -> None:
    model, (_, kind, asked) = make(task), TASKS[task]
    asked = asked | GIVEN.get(task, {})
    model.save(tmp_path / "pipeline")
    loaded = LatentDiffusion.load(tmp_path / "pipeline", "cpu")
    pictures = arrays(model(**asked, seed=5))
    assert pictures.shape == (2, 16, 16, 3)
    assert pictures[0].std() > 1
    assert np.array_equal(arrays(loaded(**asked, seed=5)), pictures)
    assert (loaded.task, loaded.classes, loaded.steps, loaded.guidance) == (model.task, model.classes, 3, 2.0)
    one_by_one = arrays(loaded(**asked, seed=5, batch=1))
    assert np.abs(one_by_one - pictures).max() <= 1
    none = {"vae": None} if task == "pixels" else {}
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "pipeline", **none)).__name__ == kind


@pytest.mark.parametrize("task", ["pixels", "unconditional", "inpaint", "upscale"])
def test_plain_diffusers_makes_the_same_picture(task: str, make: Make, tmp_path: Path) -> None:
    model = make(task)
    words = {"prompts": "red heart"} if model.text else {}
    ours = arrays(model(**words, **GIVEN.get(task, {}), seed=5, noise_level=40))[0]
    model.save(tmp_path / "pipeline")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    generator, noise = torch.Generator().manual_seed(5), initial_noise((4, 8, 8), [5])
    told: dict[str, Any] = {"num_inference_steps": 3, "generator": generator}
    if model.text:
        told |= {"prompt": "red heart", "guidance_scale": 2.0, "latents": noise, "image": GIVEN[task]["image"]}
    if task == "inpaint":
        told |= {"mask_image": GIVEN[task]["mask"], "strength": 1.0, "height": 16, "width": 16}
    if task == "upscale":
        torch.randn(4, 8, 8, generator=generator)  # made the noise; what follows is the small picture's
        told["noise_level"] = 40
    theirs = arrays(pipe(**told).images)[0]
    if task == "inpaint":  # theirs leaves the rest as the autoencoder rebuilds it; ours as it was
        kept = np.asarray(GIVEN[task]["mask"].convert("L")) < 128
        assert np.array_equal(ours[kept], np.asarray(GIVEN[task]["image"])[kept])
        ours, theirs = ours[~kept], theirs[~kept]
    assert np.abs(ours - theirs).max() <= 1
    assert ours.std() > 1


def test_guidance_pulls_towards_the_class_and_away_from_none(make: Make) -> None:
    """Without text: ε_∅ + scale·(ε_c − ε_∅), ∅ being one class more than there are."""
    model = make("class")
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([400])

    def output(label: int) -> torch.Tensor:
        return model.unet(x, t, class_labels=torch.tensor([label])).sample

    assert not torch.allclose(output(1), output(3))
    once = model.latents(None, [0], Sampling(1, 3.0), labels=["dog"])
    noise = initial_noise((4, 8, 8), [0])
    with torch.no_grad():
        rule = scheduler(DiffusionProcess("v", "cosine"), "dpm++")
        rule.set_timesteps(1)
        t = rule.timesteps[:1]
        without, with_it = (model.unet(noise, t, class_labels=torch.tensor([label])).sample for label in (3, 1))
        expected = rule.step(without + 3 * (with_it - without), t[0], noise).prev_sample
    torch.testing.assert_close(once, expected, atol=1e-4, rtol=1e-4)


def test_an_inpainting_model_is_told_nothing_of_what_is_in_the_hole(make: Make) -> None:
    model, rng = make("inpaint"), np.random.default_rng(1)
    inside = np.asarray(hole())[..., None] > 127
    other = Image.fromarray(np.where(inside, rng.integers(0, 255, (16, 16, 3), np.uint8), np.asarray(picture(16))))
    pictures = [arrays(model("red heart", image=image, mask=hole())) for image in (picture(16), other)]
    assert np.array_equal(*pictures)


@pytest.mark.parametrize(
    ("task", "asked", "says"),
    [
        ("unconditional", {"prompts": "a heart"}, "prompt: this model was trained without text; give labels, or count"),
        ("unconditional", {"labels": ["dog"]}, "labels: this model knows no classes; leave them out"),
        ("unconditional", {"mask": hole()}, "mask: of no image; give the image too"),
        ("unconditional", {"size": (20, 17)}, "size: 20x17; this model makes sides that are multiples of 4, 20x16 for"),
        ("unconditional", {"size": (16, 16), "image": picture(16)}, "size: is that of the image"),
        ("unconditional", {"image": picture(16), "strength": 1.1}, "strength: 1.1; give 0 to 1"),
        ("unconditional", {"solver": "dmp++"}, "solver: 'dmp++'; give ddpm, ddim,"),
        ("unconditional", {"solver": "ddim", "timestep_spacing": "karras"}, "spacing: ddim has no 'karras'"),
        ("unconditional", {"num_inference_steps": 1001}, "steps: 1001; the model's chain has 1000"),
        ("unconditional", {"threshold": 0.99}, "threshold: is for pixels"),
        ("sizes", {"prompts": ["a"], "guidance_scale": -1.0}, "guidance_scale: -1.0; give 0 or more"),
        ("class", {}, "labels: none given; there are cat, dog, heart"),
        ("class", {"labels": ["dgo"]}, "labels: no class 'dgo'; did you mean 'dog'?"),
        ("class", {"labels": [3]}, "labels: no class 3; there are 3: cat, dog, heart"),
        ("class", {"labels": [-1]}, "labels: no class -1"),
        ("class", {"prompts": ["dog"], "labels": ["dog"]}, "prompt: this model was trained without text"),
        ("text and class", {"prompts": ["a"], "labels": ["dog", "cat"]}, "labels: 2 for 1 prompts; give one each"),
        ("text and class", {"prompts": ["a"]}, "labels: none given"),
        ("text and class", {"labels": ["dog"]}, "prompt: an empty prompt"),
        ("sizes", {"prompts": ["a"], "labels": ["dog"]}, "labels: this model knows no classes"),
        ("inpaint", {"prompts": ["a"], "image": picture(16)}, "mask: needed; this model completes an image"),
        ("inpaint", {"prompts": ["a"], "mask": hole()}, "image: needed; this model completes an image"),
        (
            "inpaint",
            {"prompts": ["a"] * 3, "image": [picture(16)] * 2, "mask": hole()},
            "image: 2 for 3 images; give one, or one each",
        ),
        ("inpaint", {"prompts": ["a"], "image": picture(20), "mask": hole()}, "mask: 16 × 16 pixels, but the image"),
        (
            "inpaint",
            {"prompts": ["a"], "image": picture(16), "mask": picture(8)},
            "mask: 8 × 8 pixels, but the image",
        ),
        ("inpaint", {"prompts": ["a"] * 2, "image": [picture(16), picture(20)], "mask": hole()}, "image: of 2 sizes"),
        ("upscale", {"prompts": ["a"]}, "image: needed; this model enlarges an image"),
        ("upscale", {"prompts": ["a"], "image": picture(8), "mask": hole()}, "mask: leave it out"),
        ("upscale", {"prompts": ["a"], "image": picture(8), "noise_level": 350}, "noise_level: 350; give 0 to 349"),
    ],
)
def test_a_wrong_call_is_one_line(task: str, asked: dict[str, Any], says: str, make: Make) -> None:
    with pytest.raises(UserError) as error:
        make(task)(**asked)
    assert says in str(error.value)
    assert "\n" not in str(error.value)

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
from ldm.sampling.pipeline import Interpolation, LatentDiffusion
from ldm.sampling.solvers import scheduler
from ldm.utils.errors import UserError

BuildModel = Callable[[str], LatentDiffusion]
TASKS: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "pixels": ((), "DDPMPipeline", {"count": 2}),
    "unconditional": ((), "LDMPipeline", {"count": 2}),
    "class": (("class",), "LDMPipeline", {"labels": ["dog", "cat"]}),
    "text and class": (("text", "class"), "StableDiffusionPipeline", {"prompts": ["a", "b"], "labels": ["dog", 2]}),
    "sizes": (("text", "size"), "StableDiffusionPipeline", {"prompts": ["a", "b"]}),
    "inpaint": (("text", "inpaint"), "StableDiffusionInpaintPipeline", {"prompts": ["a", "b"]}),
    "upscale": (("text", "upscale"), "StableDiffusionUpscalePipeline", {"prompts": ["a", "b"]}),
}


def random_image(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(side).integers(0, 255, (side, side, 3), np.uint8))


def mask_image() -> Image.Image:
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 6:] = 255
    mask[10:, :4] = 150  # light grey counts as white, as in diffusers
    mask[:2] = 100
    return Image.fromarray(mask)


INPUTS = {"inpaint": {"image": random_image(16), "mask": mask_image()}, "upscale": {"image": random_image(8)}}


@pytest.fixture
def build_model(random_model: Callable[..., LatentDiffusion]) -> BuildModel:
    return lambda task: random_model(*TASKS[task][0], pixels=task == "pixels")


def arrays(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


@pytest.mark.parametrize("task", TASKS)
def test_a_saved_model_makes_the_same_images_and_diffusers_opens_it(
    task: str, build_model: BuildModel, tmp_path: Path
) -> None:
    model, (_, kind, arguments) = build_model(task), TASKS[task]
    arguments = arguments | INPUTS.get(task, {})
    model.save(tmp_path / "pipeline")
    loaded = LatentDiffusion.load(tmp_path / "pipeline", "cpu")
    images = arrays(model(**arguments, seed=5))
    assert images.shape == (2, 16, 16, 3)
    assert images[0].std() > 1
    assert np.array_equal(arrays(loaded(**arguments, seed=5)), images)
    assert (loaded.task, loaded.classes, loaded.steps, loaded.guidance) == (model.task, model.classes, 3, 2.0)
    one_by_one = arrays(loaded(**arguments, seed=5, batch=1))
    assert np.abs(one_by_one - images).max() <= 1
    parts = {"vae": None} if task == "pixels" else {}
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "pipeline", **parts)).__name__ == kind


@pytest.mark.parametrize("task", ["pixels", "unconditional", "inpaint", "upscale"])
def test_plain_diffusers_makes_the_same_image(task: str, build_model: BuildModel, tmp_path: Path) -> None:
    model = build_model(task)
    prompt = {"prompts": "red heart"} if model.text else {}
    noise_level = {"noise_level": 40} if task == "upscale" else {}
    sampled = arrays(model(**prompt, **INPUTS.get(task, {}), seed=5, **noise_level))[0]
    model.save(tmp_path / "pipeline")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    generator, noise = torch.Generator().manual_seed(5), initial_noise((4, 8, 8), [5])
    arguments: dict[str, Any] = {"num_inference_steps": 3, "generator": generator}
    if model.text:
        arguments |= {"prompt": "red heart", "guidance_scale": 2.0, "latents": noise, "image": INPUTS[task]["image"]}
    if task == "inpaint":
        arguments |= {"mask_image": INPUTS[task]["mask"], "strength": 1.0, "height": 16, "width": 16}
    if task == "upscale":
        torch.randn(4, 8, 8, generator=generator)  # skip the draws of the initial noise; the next are the small image's
        arguments["noise_level"] = 40
    reference = arrays(pipe(**arguments).images)[0]
    if task == "inpaint":  # outside the mask, diffusers keeps the autoencoder's reconstruction, and ldm the original
        kept = np.asarray(INPUTS[task]["mask"].convert("L")) < 128
        assert np.array_equal(sampled[kept], np.asarray(INPUTS[task]["image"])[kept])
        sampled, reference = sampled[~kept], reference[~kept]
    assert np.abs(sampled - reference).max() <= 1
    assert sampled.std() > 1


def test_guidance_of_a_class_conditional_model_extrapolates_from_the_null_class(build_model: BuildModel) -> None:
    """Without text: ε_∅ + scale·(ε_c − ε_∅), ∅ being one class more than there are."""
    model = build_model("class")
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([400])

    def output(label: int) -> torch.Tensor:
        return model.unet(x, t, class_labels=torch.tensor([label])).sample

    assert not torch.allclose(output(1), output(3))
    latents = model.latents(None, [0], Sampling(1, 3.0), labels=["dog"])
    noise = initial_noise((4, 8, 8), [0])
    with torch.no_grad():
        rule = scheduler(DiffusionProcess("v", "cosine"), "dpm++")
        rule.set_timesteps(1)
        t = rule.timesteps[:1]
        unconditional, conditional = (
            model.unet(noise, t, class_labels=torch.tensor([label])).sample for label in (3, 1)
        )
        expected = rule.step(unconditional + 3 * (conditional - unconditional), t[0], noise).prev_sample
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


def test_the_masked_pixels_do_not_influence_inpainting(build_model: BuildModel) -> None:
    model, rng = build_model("inpaint"), np.random.default_rng(1)
    masked = np.asarray(mask_image())[..., None] > 127
    other = Image.fromarray(np.where(masked, rng.integers(0, 255, (16, 16, 3), np.uint8), np.asarray(random_image(16))))
    images = [arrays(model("red heart", image=image, mask=mask_image())) for image in (random_image(16), other)]
    assert np.array_equal(*images)


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("unconditional", {"prompts": "a heart"}, "prompt: this model was trained without text; give labels, or count"),
        ("unconditional", {"labels": ["dog"]}, "labels: this model knows no classes; leave them out"),
        ("unconditional", {"mask": mask_image()}, "mask: of no image; give the image too"),
        ("unconditional", {"size": (20, 17)}, "size: 20x17; this model makes sides that are multiples of 4, 20x16 for"),
        ("unconditional", {"size": (16, 16), "image": random_image(16)}, "size: is that of the image"),
        ("unconditional", {"image": random_image(16), "strength": 1.1}, "strength: 1.1; give 0 to 1"),
        ("unconditional", {"solver": "dmp++"}, "solver: 'dmp++'; give ddpm, ddim,"),
        ("unconditional", {"solver": "ddim", "timestep_spacing": "karras"}, "timestep_spacing: ddim has no 'karras'"),
        ("unconditional", {"num_inference_steps": 1001}, "num_inference_steps: 1001; the model's chain has 1000"),
        ("unconditional", {"threshold": 0.99}, "threshold: is for pixels"),
        ("unconditional", {"count": 0}, "count: 0; give 1 or more"),
        ("sizes", {"prompts": ["a"], "count": -1}, "count: -1; give 1 or more"),
        ("unconditional", {"eta": 0.5}, "eta: only ddim adds noise by it; leave it out"),
        ("unconditional", {"eta": 0.5, "solver": "lcm"}, "eta: only ddim"),
        ("unconditional", {"strength": 0.5}, "strength: no image is changed; leave it out"),
        ("upscale", {"prompts": ["a"], "image": random_image(8), "strength": 0.5}, "strength: no image is changed"),
        ("unconditional", {"noise_level": 40}, "noise_level: this model enlarges no image; leave it out"),
        (
            "class",
            {"labels": ["dog"], "negative_prompt": "blue"},
            "negative_prompt: this model was trained without text",
        ),
        ("unconditional", {"classifier_scale": 2.0}, "classifier_scale: there is no classifier; leave it out"),
        (
            "unconditional",
            {"toward": Interpolation(["a cat"], [1], [0.5])},
            "toward: it has prompts, and this model was trained without text",
        ),
        (
            "sizes",
            {"prompts": ["a", "b"], "toward": Interpolation(["a", "b"], [1, 2], [0.5])},
            "toward: 1 shares for 2 images; give one each",
        ),
        ("unconditional", {"count": 2, "toward": Interpolation(None, [1], [0.5, 0.5])}, "toward: 1 seeds for 2 images"),
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
        ("inpaint", {"prompts": ["a"], "image": random_image(16)}, "mask: needed; this model completes an image"),
        ("inpaint", {"prompts": ["a"], "mask": mask_image()}, "image: needed; this model completes an image"),
        (
            "inpaint",
            {"prompts": ["a"] * 3, "image": [random_image(16)] * 2, "mask": mask_image()},
            "image: 2 for 3 images; give one, or one each",
        ),
        (
            "inpaint",
            {"prompts": ["a"], "image": random_image(20), "mask": mask_image()},
            "mask: 16 × 16 pixels, but the image",
        ),
        (
            "inpaint",
            {"prompts": ["a"], "image": random_image(16), "mask": random_image(8)},
            "mask: 8 × 8 pixels, but the image",
        ),
        (
            "inpaint",
            {"prompts": ["a"] * 2, "image": [random_image(16), random_image(20)], "mask": mask_image()},
            "image: of 2 sizes",
        ),
        ("unconditional", {"labels": []}, "labels: an empty list; give one or more, or None"),
        ("unconditional", {"prompts": []}, "prompt: an empty list"),
        ("upscale", {"prompts": ["a"]}, "image: needed; this model enlarges an image"),
        ("upscale", {"prompts": ["a"], "image": random_image(8), "mask": mask_image()}, "mask: leave it out"),
        (
            "upscale",
            {"prompts": ["a"], "image": random_image(8), "noise_level": 350},
            "noise_level: 350; give 0 to 349",
        ),
    ],
)
def test_a_wrong_call_is_one_line(task: str, arguments: dict[str, Any], message: str, build_model: BuildModel) -> None:
    with pytest.raises(UserError) as error:
        build_model(task)(**arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)

"""Images and masks of a call as tensors."""

import pytest
import torch
from PIL import Image

from ldm.data.images import to_tensor
from ldm.sampling.inpainting import image_batch, mask_batch
from ldm.utils.errors import UserError


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_the_colours_below_transparency_are_white_in_an_input_image(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((80, 80, 80, 255), (0, 0, 2, 4))
    expected = Image.new("RGB", (4, 4), "white")
    expected.paste((80, 80, 80), (0, 0, 2, 4))
    pixels = image_batch("image", image.convert(mode), 3)
    assert torch.equal(pixels, to_tensor(expected).expand(3, 3, 4, 4))


def test_an_opaque_image_keeps_its_pixels() -> None:
    image = Image.effect_noise((8, 6), 60).convert("RGB")
    assert torch.equal(image_batch("image", image, 1), to_tensor(image)[None])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_first_of_several_masks_that_generates_nothing_is_named_with_its_own_maximum(as_tensor: bool) -> None:
    masks = [Image.new("L", (4, 4), brightness) for brightness in (255, 100, 0)]
    mask = torch.stack([to_tensor(image.convert("RGB")) / 2 + 0.5 for image in masks]) if as_tensor else masks
    with pytest.raises(UserError, match=r"^mask: mask\[1\] generates nothing: its brightest value is 100 of 255,"):
        mask_batch(mask, 3)


def test_a_single_mask_of_several_images_that_generates_nothing_has_no_number() -> None:
    with pytest.raises(UserError, match=r"^mask: it generates nothing: its brightest value is 7 of 255,"):
        mask_batch(Image.new("L", (4, 4), 7), 3)

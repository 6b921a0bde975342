"""What a U-Net is told, in diffusers' terms."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from ldm.models.conditioning import guidance_embedding


@pytest.mark.parametrize("width", [32, 33, 256])
def test_a_scale_of_guidance_is_told_as_diffusers_tells_it(width: int) -> None:
    scale = torch.tensor([1.0, 2.0, 7.5])
    theirs = StableDiffusionPipeline.get_guidance_scale_embedding(None, scale - 1, width)
    torch.testing.assert_close(guidance_embedding(scale, width), theirs, rtol=0, atol=2e-4)  # sines of thousands

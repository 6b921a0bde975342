"""The guidance embedding, against diffusers."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from ldm.models.conditioning import guidance_embedding


@pytest.mark.parametrize("width", [32, 33, 256])
def test_the_guidance_embedding_equals_diffusers(width: int) -> None:
    scale = torch.tensor([1.0, 2.0, 7.5])
    expected = StableDiffusionPipeline.get_guidance_scale_embedding(None, scale - 1, width)
    # float32 sines of angles in the thousands
    torch.testing.assert_close(guidance_embedding(scale, width), expected, rtol=0, atol=2e-4)

"""A model and an adapter of it, which tests of several pages share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ldm.app import roots
from ldm.models.adapters import diffusers_layout
from ldm.models.adapters.factors import LayerAdapter
from ldm.models.adapters.reader import weighted_layers
from ldm.sampling.pipeline import LatentDiffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., LatentDiffusion]) -> Path:
    """The pipeline of a run, two folders below a root."""
    folder = tmp_path_factory.mktemp("roots") / "runs/a/pipeline"
    random_model("text").save(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """The file of an adapter of one layer, in the run's folder."""
    unet = LatentDiffusion.load(folder).unet
    name = next(name for name in weighted_layers(unet) if name.endswith("to_q"))
    outputs, inputs = unet.get_submodule(name).weight.shape
    factors = {"lora_A": torch.full((1, inputs), 0.1), "lora_B": torch.full((outputs, 1), 0.1)}
    file = folder.parent / "lora/pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    diffusers_layout.write(file, {"unet": {name: LayerAdapter(factors)}})
    return file


@pytest.fixture
def rooted(folder: Path) -> Iterator[None]:
    """The app's roots have the model's run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(roots.ROOTS, str(folder.parents[1]))
        yield

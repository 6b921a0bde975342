"""The model card of a finished run."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from ldm.config import loader
from ldm.data.images import grid
from ldm.training.model_card import write_card
from ldm.training.run_dir import prepare_run_dir


@pytest.fixture
def settings(root: Path, tmp_path: Path) -> loader.Config:
    return loader.load(root / "configs/tiny.yaml", [f"run.dir={tmp_path / 'run'}"])


def test_the_card_lists_metrics_and_the_datas_licence(settings: loader.Config) -> None:
    prepare_run_dir(settings)
    write_card(settings, {"psnr": 28.0, "held-out": {"top1": 0.5}})
    card = (settings.run.dir / "README.md").read_text()
    assert "CC BY-SA 4.0" in card
    assert "| psnr | 28.000 |" in card
    assert "| held-out top1 | 0.500 |" in card


def test_frames_are_explained_where_one_is_drawn(settings: loader.Config) -> None:
    file = prepare_run_dir(settings).run.dir / "stage2/samples/step-000010.png"
    file.parent.mkdir(parents=True)
    for marked in ([], [1]):
        grid([Image.new("RGB", (32, 32))] * 2, ["a", "b"], columns=8, marked=marked).save(file)
        write_card(settings)
        card = (settings.run.dir / "README.md").read_text()
        assert "![samples](samples.png)" in card and ("Framed: prompts of held-out images." in card) == bool(marked)


def test_the_hub_reads_the_cards_metadata(settings: loader.Config) -> None:
    prepare_run_dir(settings)
    fid = {"value": 12.5, "low": 11.0, "high": 14.0, "images": 100, "network": "Inception-v3, 2048"}
    write_card(
        settings,
        {
            "guidance": 3.0,
            "figures": {"inception": {"fid": fid}, "latents": {"fid": {"value": 2.5, "images": 100}}},
            "sampling of figures": {"steps": 5, "guidance": 1.5},
            "real against real": {"inception": {"fid": 3.0}},
            "pixels": {"top1": 0.5},
        },
    )
    card = ModelCard.load(settings.run.dir / "README.md")
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "text-to-image", "cc-by-sa-4.0")
    assert data.base_model is None and data.datasets is None
    assert {result.metric_name: result.metric_value for result in data.eval_results or ()} == {
        "inception fid (100 images)": 12.5,
        "latents fid (100 images)": 2.5,
        "pixels top1": 0.5,
    }
    types = [result.metric_type for result in data.eval_results or ()]
    assert types == ["fid", "fid-latents", "top1-pixels"]  # the Hub's "fid" is Inception's
    assert "| inception fid | 12.500 [11.000, 14.000], 100 images |" in card.content


def test_the_metadata_name_models_and_data_of_the_hub_only(root: Path, tmp_path: Path) -> None:
    for base, source, expected in (
        ("owner/model", "owner/images", ("owner/model", "adapter", ["owner/images"])),
        (str(tmp_path), str(tmp_path), (None, None, None)),
    ):
        overrides = [f"run.dir={tmp_path / 'run'}", f"stage2.init_from={base}", f"data.source={source}"]
        settings = loader.load(root / "configs/lora-sd15.yaml", overrides)
        settings.run.dir.mkdir(exist_ok=True)
        write_card(settings)
        data = ModelCard.load(settings.run.dir / "README.md").data
        assert (data.base_model, data.to_dict().get("base_model_relation"), data.datasets) == expected
        assert data.license is None and "lora" in (data.tags or ())

"""What is found before training."""

from pathlib import Path

import pytest

from ldm import autoencoder, config, plan
from ldm.errors import UserError
from ldm.schema import Stage1Config


def tiny(root: Path, *overrides: str) -> config.Config:
    return config.load(root / "configs/tiny.yaml", overrides)


def test_a_sound_configuration_gives_its_text_encoder(root: Path) -> None:
    encoder = plan.check(tiny(root), processes=2)
    assert (encoder.length, encoder.width) == (16, 384)


@pytest.mark.parametrize(
    ("overrides", "processes", "says"),
    [
        (["stage2.batch=16"], 3, r"stage1\.batch: 16 can't be shared by 3 processes"),
        (["stage1.micro_batches=8"], 4, "make it a multiple of 32"),
        (["text.width=768"], 1, r"text\.width: 768, but .* has 384"),
        (["stage2.channels=[32, 32, 32, 32, 32, 32]", "stage2.attention=[false, false, false, false, false, false]"],
         1, r"stage2\.channels: 6 levels"),
    ],
)  # fmt: skip
def test_what_would_stop_a_later_stage_is_found_first(
    root: Path, overrides: list[str], processes: int, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        plan.check(tiny(root, *overrides), processes)


def test_a_stage_that_is_not_trained_limits_no_processes(root: Path, tmp_path: Path) -> None:
    autoencoder.build(
        Stage1Config(channels=(16, 32), layers=1, latent_channels=4, groups=8, mid_attention=False), 32
    ).save_pretrained(tmp_path)
    plan.check(tiny(root, f"stage1.pretrained={tmp_path}", "stage2.batch=32"), processes=32)


def test_a_loaded_autoencoder_must_be_the_one_described(root: Path, tmp_path: Path) -> None:
    autoencoder.build(
        Stage1Config(channels=(16, 16, 16), layers=1, latent_channels=4, groups=8, mid_attention=False), 32
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"stage1\.channels \(its factor\): 2, but .* has 4"):
        plan.check(tiny(root, f"stage1.pretrained={tmp_path}"), processes=1)

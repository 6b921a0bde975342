"""Text encoders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm import text
from ldm.errors import UserError


def test_minilm_loads_offline_and_pads_to_one_length() -> None:
    encoder = text.load(text.MINILM, 16)
    states = encoder.encode(["red heart", "a very long caption " * 20])
    assert states.shape == (2, 16, 384)
    assert torch.allclose(encoder.encode(["red heart"])[0], states[0], atol=1e-5)


def test_padding_does_not_change_the_words() -> None:
    short, long = text.load(text.MINILM, 8), text.load(text.MINILM, 16)
    assert torch.allclose(short.encode(["red heart"])[0, :4], long.encode(["red heart"])[0, :4], atol=1e-4)


def test_another_minilm_than_the_published_one_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "all-MiniLM-L6-v2"
    shutil.copytree(text._folder(text.MINILM), folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(UserError, match=text.MINILM_SHA256):
        text.load(str(folder))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A CLIP text encoder of two layers, in a local folder as the Hub keeps them."""
    letters = [chr(c) for c in range(97, 123)]
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"), model_max_length=77
    )
    tokenizer.save_pretrained(tmp_path)
    config = CLIPTextConfig(
        vocab_size=len(names), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=len(names) - 2, eos_token_id=len(names) - 1,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_clip_loads_by_the_same_key(clip: Path) -> None:
    encoder = text.load(str(clip), width=32)
    assert (encoder.length, encoder.width) == (77, 32)
    assert encoder.encode(["abc", "xyz"]).shape == (2, 77, 32)
    with pytest.raises(UserError, match=r"text\.width: 768"):
        text.load(str(clip), width=768)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"text\.model: 'no/such-model'"):
        text.load("no/such-model")

"""New words of a text encoder: what learns, what stays, and the files that other programs read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import load_file, save_file
from sdxl import POOLED
from stable_diffusion import PIPELINES

from ldm.cli import txt2img
from ldm.models import text_encoder
from ldm.models.adapters.embedding_files import write_embeddings
from ldm.models.adapters.token_embedding import add_token, learned_rows
from ldm.models.text_encoder import AnyTextEncoder
from ldm.sampling.loop import initial_noise
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError

WORD, PROMPT = "<toy>", "a red <toy> and <toy>"
CALL: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small pipelines of Stable Diffusion 1 and XL."""
    root = tmp_path_factory.mktemp("pipelines")
    for name in ("sd1", "sdxl"):
        PIPELINES[name](root).save_pretrained(root / name)
    return {name: root / name for name in ("sd1", "sdxl")}


def trained(encoder: AnyTextEncoder, vectors: int, initializer: str = "d") -> AnyTextEncoder:
    """The encoder with a word whose rows are far from where they started."""
    torch.manual_seed(1)
    for row in add_token(encoder, WORD, initializer, vectors):
        torch.nn.init.normal_(row)
    return encoder


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(("kind", "vectors"), [("sd1", 1), ("sd1", 3), ("sdxl", 2)])
def test_diffusers_draws_the_same_image_from_our_files(
    kind: str, vectors: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    write_embeddings(tmp_path / "embeddings", trained(text_encoder.load(str(folders[kind])), vectors), WORD)
    plain = PIPELINES[kind](tmp_path)
    if kind == "sd1":
        plain.load_textual_inversion(tmp_path / "embeddings")
    else:
        rows = load_file(tmp_path / "embeddings/toy.safetensors")
        plain.load_textual_inversion(rows["clip_l"], WORD, plain.tokenizer, plain.text_encoder)
        plain.load_textual_inversion(rows["clip_g"], WORD, plain.tokenizer_2, plain.text_encoder_2)
    plain.set_progress_bar_config(disable=True)
    noise = initial_noise((4, 8, 8), [5])
    expected = pixels(plain(PROMPT, **CALL, width=16, height=16, latents=noise).images[0])

    model = LatentDiffusion.load(folders[kind], "cpu")
    without = pixels(model(PROMPT, seed=5, **CALL)[0])
    image = pixels(model.add_embeddings(tmp_path / "embeddings")(PROMPT, seed=5, **CALL)[0])
    assert np.abs(image - expected).max() <= 1
    assert np.abs(image - without).max() > 1


def test_a_word_of_several_vectors_is_expanded_as_diffusers_does(folders: dict[str, Path]) -> None:
    encoder = trained(text_encoder.load(str(folders["sd1"])), 3)
    for prompt in (PROMPT, "a<toy>", "no such word", "<toy>"):
        expected = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, encoder.tokenizer)
        ids = encoder.tokenizer(expected, padding="max_length", max_length=77).input_ids
        assert encoder.token_ids([prompt])[0, 0, 0].tolist() == ids
    assert torch.equal(encoder.token_ids(["<TOY>"]), encoder.token_ids(["<toy>"]))
    assert encoder.count_tokens(["<toy>"]) == [5]
    assert encoder.unread("b" * 73 + "<toy>") == "<toy>_2"


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "bert"])
def test_only_the_rows_of_the_word_learn_byte_for_byte(kind: str, folders: dict[str, Path], words: Path) -> None:
    encoder = text_encoder.load(str({**folders, "bert": words}[kind]), 16 if kind == "bert" else None)
    before = [{name: tensor.clone() for name, tensor in m.state_dict().items()} for m in encoder.models]
    prompts = ["red heart", "a red <toy>"]
    unchanged = encoder.embed(prompts[:1])
    rows = add_token(encoder, WORD, "heart" if kind == "bert" else "d", 2)
    assert torch.equal(encoder.embed(prompts[:1]).states, unchanged.states)  # of a prompt without the word
    parameters = [p for model in encoder.models for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in parameters} == {id(row) for row in rows}
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    start = [row.detach().clone() for row in rows]
    for _ in range(2):
        embedding = encoder.embed_tokens(encoder.token_ids(prompts))
        loss = (embedding.states * torch.randn_like(embedding.states)).sum()
        (loss + embedding.pooled.sum() if embedding.pooled is not None else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    for old, new in zip(start, learned_rows(encoder), strict=True):
        assert bool((old != new).any(1).all())
    for old_state, model in zip(before, encoder.models, strict=True):
        state = {name.replace(".base.", "."): t for name, t in model.state_dict().items() if ".learned" not in name}
        assert state.keys() == old_state.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in old_state.items())


def test_the_rows_start_from_the_initializers_tokens(folders: dict[str, Path]) -> None:
    def start(initializer: str, vectors: int) -> torch.Tensor:
        encoder = text_encoder.load(str(folders["sd1"]))
        weight = encoder.model.get_input_embeddings().weight.detach().clone()
        ids = encoder.tokenizer(initializer, add_special_tokens=False).input_ids
        add_token(encoder, WORD, initializer, vectors)
        return weight[ids], learned_rows(encoder)[0]

    for initializer, vectors, order in (("d", 1, [0]), ("d", 2, [0, 0]), ("d o", 2, [0, 1]), ("d o", 3, [0, 1, 0])):
        weights, rows = start(initializer, vectors)
        assert torch.equal(rows, weights[order])
    weights, rows = start("d o g", 1)
    torch.testing.assert_close(rows, weights.mean(0, keepdim=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("<Toy>", "d", 1), "finetune.token: <Toy> is read as <toy>; set it to that"),
        (("a", "d", 1), "finetune.token: a is a word that the text encoder knows already"),
        (
            ("<toy>", "d o g", 2),
            "finetune.vectors: 2, but the initializer 'd o g' has 3 tokens; set 1, .* or 3 or more",
        ),
        (("<toy>", " ", 1), "finetune.initializer: ' ' has no word that the text encoder knows"),
    ],
)
def test_a_word_that_cannot_be_added_is_refused(
    arguments: tuple[Any, ...], message: str, folders: dict[str, Path]
) -> None:
    encoder = text_encoder.load(str(folders["sd1"]))
    with pytest.raises(UserError, match=message):
        add_token(encoder, *arguments)
    assert not encoder.added_words


def test_files_of_other_programs_are_read_and_others_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    row, many = torch.randn(16), torch.randn(2, 16)
    files = {
        "a.safetensors": {"<x>": row},
        "easy.safetensors": {"emb_params": many.half()},
        "wide.safetensors": {"<y>": torch.randn(1, 8)},
        "sdxl.safetensors": {"clip_l": many, "clip_g": torch.randn(2, 24)},
        "known.safetensors": {"a": row},
        "two words.safetensors": {"emb_params": row},
        "unet.safetensors": {name: row.clone() for name in "bcd"},
        "nan.safetensors": {"<n>": row * torch.nan},
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name)
    model = LatentDiffusion.load(folders["sd1"], "cpu")
    model.add_embeddings(tmp_path / "a.safetensors", tmp_path / "easy.safetensors")
    ids = model.text.token_ids(["b easy <x>"])[0, 0, 0, 1:5]
    expected = torch.cat([many.half().float(), row[None]])
    torch.testing.assert_close(model.text.model.get_input_embeddings()(ids)[1:], expected)
    for name, message in (
        ("wide", "has vectors of 8 numbers, and the model's text encoder 16"),
        ("sdxl", "was made for 2 text encoders, and the model has 1"),
        ("known", "its word a is one that the text encoder knows already"),
        ("a", "its word <x> is one that the text encoder knows already"),
        ("two words", "its word would be 'two words'; rename the file"),
        ("unet", "holds 3 tensors, .* no learned word"),
        ("nan", "has NaN or infinite numbers"),
        ("missing", "no such file"),
    ):
        with pytest.raises(UserError, match=f"^--embedding: .*{message}"):
            model.add_embeddings(tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"^--embedding: .* has 8 \.safetensors; name one"):
        model.add_embeddings(tmp_path)


def test_a_model_with_the_word_is_saved_and_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    write_embeddings(tmp_path / "embeddings", trained(text_encoder.load(str(folders["sdxl"])), 2), WORD)
    model = LatentDiffusion.load(folders["sdxl"], "cpu").add_embeddings(tmp_path / "embeddings")
    model.save(tmp_path / "saved")
    loaded, embedding = LatentDiffusion.load(tmp_path / "saved", "cpu").text.embed([PROMPT]), model.text.embed([PROMPT])
    assert torch.equal(loaded.states, embedding.states)
    assert torch.equal(loaded.pooled, embedding.pooled)
    assert loaded.pooled.shape == (1, POOLED)


def test_an_image_with_an_embedding_is_recreated_and_another_embedding_is_noticed(
    folders: dict[str, Path], tmp_path: Path, call: Callable[..., str]
) -> None:
    save_file({"emb_params": torch.randn(2, 16)}, tmp_path / "toy.safetensors")
    common = ("--model", folders["sd1"], "--steps", 2, "--device", "cpu")
    words = ("--embedding", tmp_path / "toy.safetensors")
    call(txt2img.main, *common, *words, "--prompt", "a toy", "--out", tmp_path / "image.png")
    call(txt2img.main, "--again", tmp_path / "image.png", "--device", "cpu", "--out", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "image.png").read_bytes()
    (tmp_path / "toy.safetensors").rename(tmp_path / "other.safetensors")  # the same numbers, another word
    again = ("--again", tmp_path / "image.png", "--embedding", tmp_path / "other.safetensors", "--device", "cpu")
    output = call(txt2img.main, *again, "--out", tmp_path / "no.png", status=2)
    assert "other weights than those that made it" in output
    assert "other.safetensors" in output

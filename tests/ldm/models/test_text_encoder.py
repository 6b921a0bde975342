"""Text encoders: states against diffusers and transformers, chunks, skipped layers, gradients."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from ldm.config import loader
from ldm.config.schema import TextConfig
from ldm.models import text_encoder, text_encoder_files, text_normalization
from ldm.utils.atomic_files import tensors_sha256
from ldm.utils.errors import UserError


def test_minilm_loads_offline_and_pads_to_a_fixed_length() -> None:
    encoder = text_encoder.load(text_encoder_files.MINILM, 16)
    states = encoder.encode(["red heart", "a very long caption " * 20])
    assert states.shape == (2, 16, 384)
    assert torch.allclose(encoder.encode(["red heart"])[0], states[0], atol=1e-5)


def test_padding_does_not_change_the_states_of_words() -> None:
    short, long = text_encoder.load(text_encoder_files.MINILM, 8), text_encoder.load(text_encoder_files.MINILM, 16)
    assert torch.allclose(short.encode(["red heart"])[0, :4], long.encode(["red heart"])[0, :4], atol=1e-4)


def test_a_minilm_that_differs_from_the_published_one_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "all-MiniLM-L6-v2"
    shutil.copytree(text_encoder_files.local_folder(text_encoder_files.MINILM), folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(UserError, match=text_encoder_files.MINILM_SHA256):
        text_encoder.load(str(folder))


WORDS = [chr(c) for c in range(97, 123)]  # one token each


def tiny_clip(folder: Path) -> Path:
    """A CLIP text encoder of two layers, in a local folder laid out as on the Hub."""
    names = [*WORDS, *(letter + "</w>" for letter in WORDS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77)
    tokenizer.save_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=len(names),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=len(names) - 2,
        eos_token_id=len(names) - 1,
    )
    CLIPTextModel(config).save_pretrained(folder)
    return folder


def tiny_tokenizer(template: str, **special: str) -> PreTrainedTokenizerFast:
    """Letters are tokens; `template` adds special tokens to a caption."""
    ids = {name: i for i, name in enumerate([*dict.fromkeys(special.values()), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(ids.items()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=77, **special)


def tiny_bert(folder: Path) -> Path:
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tiny_tokenizer("[CLS] $A [SEP]", **special).save_pretrained(folder)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_dropout_prob=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def tiny_t5(folder: Path) -> Path:
    tiny_tokenizer("$A </s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    config = T5Config(vocab_size=40, d_model=32, d_kv=16, d_ff=64, num_layers=3, num_heads=2, dropout_rate=0.5)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return tiny_clip(tmp_path)


@pytest.fixture(params=[tiny_clip, tiny_bert, tiny_t5])
def any_kind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param(tmp_path))


def diffusers_states(encoder: text_encoder.TextEncoder, prompts: list[str], **options: int) -> torch.Tensor:
    """The prompts' states from diffusers with this encoder and its tokenizer, `(N, L, C)`."""
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with torch.no_grad():
        return pipeline.encode_prompt(prompts, "cpu", 1, False, **options)[0]


def test_clip_loads_from_a_folder_and_its_width_is_checked(clip: Path) -> None:
    encoder = text_encoder.load(str(clip), width=32)
    assert (encoder.length, encoder.width) == (77, 32)
    assert encoder.encode(["abc", "xyz"]).shape == (2, 77, 32)
    with pytest.raises(UserError, match=r"text\.width: 768"):
        text_encoder.load(str(clip), width=768)


def test_a_missing_model_is_named() -> None:
    with pytest.raises(UserError, match=r"text\.model: 'no/such-model'"):
        text_encoder.load("no/such-model")


PROMPTS = ["", "a b c", " ".join(WORDS * 4)]


def test_states_equal_diffusers(any_kind: str) -> None:
    encoder = text_encoder.load(any_kind, 12)
    torch.testing.assert_close(encoder.encode(PROMPTS), diffusers_states(encoder, PROMPTS), rtol=0, atol=0)


def test_a_t5_encoder_masks_padding(tmp_path: Path) -> None:
    short, long = text_encoder.load(str(tiny_t5(tmp_path)), 8), text_encoder.load(str(tmp_path), 16)
    assert isinstance(long.model, T5EncoderModel)
    torch.testing.assert_close(short.encode(["a b c"])[0, :4], long.encode(["a b c"])[0, :4])


def test_a_skipped_layer_equals_diffusers_clip_skip(clip: Path) -> None:
    full = text_encoder.load(str(clip))
    object.__setattr__(full.model, "text_model", full.model)  # where diffusers looks for the last norm
    expected = diffusers_states(full, PROMPTS, clip_skip=1)
    assert not torch.allclose(expected, full.encode(PROMPTS))
    torch.testing.assert_close(text_encoder.load(str(clip), skip_layers=1).encode(PROMPTS), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [tiny_bert, tiny_t5])
def test_a_skipped_layer_returns_the_hidden_state_before_it(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    full = text_encoder.load(str(kind(tmp_path)), 8)
    ids, mask = full.token_ids(PROMPTS).unbind(1)
    with torch.no_grad():
        states = full.model(ids[:, 0], attention_mask=mask[:, 0], output_hidden_states=True).hidden_states[-2]
        if kind is tiny_t5:
            states = full.model.encoder.final_layer_norm(states)
    torch.testing.assert_close(
        text_encoder.load(str(tmp_path), 8, skip_layers=1).encode(PROMPTS), states, rtol=0, atol=0
    )


def test_a_saved_encoder_lacks_the_skipped_layers(any_kind: str, tmp_path: Path) -> None:
    encoder = text_encoder.load(any_kind, 8, skip_layers=1)
    encoder.model.save_pretrained(tmp_path / "saved")
    loaded = type(encoder.model).from_pretrained(tmp_path / "saved")
    assert loaded.config.num_hidden_layers == text_encoder.load(any_kind).model.config.num_hidden_layers - 1
    expected = text_encoder.TextEncoder(loaded, encoder.tokenizer).encode(PROMPTS)
    torch.testing.assert_close(encoder.encode(PROMPTS), expected, rtol=0, atol=0)


def test_skipping_all_layers_is_refused(clip: Path) -> None:
    with pytest.raises(UserError, match=r"text\.skip_layers: 2 of the 2 layers .*; at most 1"):
        text_encoder.load(str(clip), skip_layers=2)


def test_chunks_are_encoded_as_separate_captions(any_kind: str) -> None:
    single, chunked = text_encoder.load(any_kind, 8), text_encoder.load(any_kind, 8, chunks=3)
    capacity = 8 - single.tokenizer.num_special_tokens_to_add()
    words = (WORDS * 4)[: 3 * capacity]
    states = chunked.encode([" ".join(words), " ".join(words[: capacity + 1]), "a", ""])
    assert states.shape == (4, chunked.length, 32) == (4, 24, 32)
    chunks = [
        [words[:capacity], words[capacity : 2 * capacity], words[2 * capacity :]],
        [words[:capacity], words[capacity : capacity + 1], []],
        [["a"], [], []],
        [[], [], []],
    ]
    expected = [torch.cat(list(single.encode([" ".join(chunk) for chunk in caption]))) for caption in chunks]
    torch.testing.assert_close(states, torch.stack(expected))
    torch.testing.assert_close(chunked.encode([" ".join(WORDS * 4)])[0, :16], states[0, :16])


def test_tokens_past_the_length_are_counted(any_kind: str) -> None:
    for chunks in (1, 2, 3):
        encoder = text_encoder.load(any_kind, 6, chunks=chunks)
        prompts = [" ".join(WORDS[:count]) for count in range(20)]
        special = set(encoder.token_ids([""])[:, 0].flatten().tolist())
        kept = [sum(i not in special for i in ids) for ids in encoder.token_ids(prompts)[:, 0].flatten(1).tolist()]
        lost = [max(0, tokens - encoder.length) for tokens in encoder.count_tokens(prompts)]
        assert [a + b for a, b in zip(kept, lost, strict=True)] == list(range(20))


def test_a_saved_encoder_remembers_its_chunks(clip: Path, tmp_path: Path) -> None:
    encoder = text_encoder.load(str(clip), 8, chunks=2)
    for component in (encoder.model, encoder.tokenizer):
        component.save_pretrained(tmp_path / "saved")
    loaded = text_encoder.TextEncoder(
        CLIPTextModel.from_pretrained(tmp_path / "saved"), CLIPTokenizer.from_pretrained(tmp_path / "saved")
    )
    assert torch.equal(loaded.encode(PROMPTS), encoder.encode(PROMPTS))
    assert text_encoder.load(str(tmp_path / "saved"), 8).length == 8


def test_the_fingerprint_depends_on_the_chunks(clip: Path) -> None:
    single, double = (text_encoder.load(str(clip), 8, chunks=chunks) for chunks in (1, 2))
    assert single.fingerprint() == tensors_sha256(single.model.state_dict(), 8)
    assert len({single.fingerprint(), double.fingerprint(), text_encoder.load(str(clip), 16).fingerprint()}) == 3


def test_trainable_parameters_get_gradients_and_dropout_stays_off(any_kind: str) -> None:
    encoder = text_encoder.load(any_kind, 8, chunks=2)
    before = encoder.encode(PROMPTS)
    trained = encoder.trainable()
    states = encoder.embed_tokens(encoder.token_ids(PROMPTS)).states
    torch.testing.assert_close(states, before)
    (states * torch.randn_like(states)).sum().backward()
    assert all(parameter.grad is not None for parameter in trained)
    frozen = {name.partition(".")[0] for name, p in encoder.model.named_parameters() if not p.requires_grad}
    assert frozen == ({"pooler"} if isinstance(encoder.model, BertModel) else set())
    assert not encoder.encode(PROMPTS).requires_grad
    assert not any(module.training for module in encoder.model.modules())


def test_gradients_equal_finite_differences(clip: Path) -> None:
    encoder = text_encoder.load(str(clip), 8)
    encoder.model.double()
    weight = encoder.trainable()[-1]
    tokens = encoder.token_ids(["a b c"])
    direction = torch.randn(encoder.embed_tokens(tokens).states.shape, generator=torch.Generator().manual_seed(0))

    def loss() -> torch.Tensor:
        return (encoder.embed_tokens(tokens).states * direction).sum()

    loss().backward()
    with torch.no_grad():
        weight += 1e-2 * weight.grad / weight.grad.norm()
        up = float(loss())
        weight -= 2e-2 * weight.grad / weight.grad.norm()
        down = float(loss())
    assert (up - down) / 2e-2 == pytest.approx(float(weight.grad.norm()), rel=1e-3)


def test_every_key_of_the_configuration_is_applied(clip: Path) -> None:
    encoder = text_encoder.of(TextConfig(model=str(clip), max_tokens=8, skip_layers=1, chunks=2))
    assert (encoder.piece, encoder.chunks, encoder.model.config.num_hidden_layers) == (8, 2, 1)


CAPTIONS = ["red heart", "green square", "a red square", "woman cook, light skin tone"] * 30


@pytest.mark.parametrize("kind", [tiny_clip, tiny_bert])
def test_normalized_states_are_those_of_the_encoder_less_their_mean_over_their_deviation(
    kind: Callable[[Path], Path], tmp_path: Path
) -> None:
    encoder = text_encoder.load(str(kind(tmp_path)), 8)
    mean, deviation = text_normalization.measure(encoder, CAPTIONS)
    changed = text_normalization.normalized(encoder, (mean, deviation))
    states = encoder.encode(["green heart", ""])
    torch.testing.assert_close(changed.encode(["green heart", ""]), (states - mean) / deviation, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encoder.encode(["green heart", ""]), states, rtol=0, atol=0)
    new_mean, new_deviation = text_normalization.measure(changed, CAPTIONS)
    torch.testing.assert_close(new_mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(new_deviation.median(), torch.tensor(1.0), atol=0.2, rtol=0)
    assert float(new_deviation.max()) < 1 + 1e-4
    changed.model.save_pretrained(tmp_path / "saved")
    encoder.tokenizer.save_pretrained(tmp_path / "saved")
    loaded = text_encoder.load(str(tmp_path / "saved"), 8)
    torch.testing.assert_close(loaded.encode(CAPTIONS[:4]), changed.encode(CAPTIONS[:4]), rtol=0, atol=0)


def test_statistics_are_measured_once_for_a_run(clip: Path, tmp_path: Path) -> None:
    encoder = text_encoder.load(str(clip), 8)
    first, again = (
        text_normalization.statistics_of_run(tmp_path, encoder, captions, "data")
        for captions in (CAPTIONS, ["another"])
    )
    other, _ = text_normalization.statistics_of_run(tmp_path, encoder, ["another"], "other data")
    assert not torch.equal(other, first[0])
    for a, b, measured in zip(first, again, text_normalization.measure(encoder, CAPTIONS), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, measured, rtol=0, atol=0)


def test_an_encoder_without_a_last_layer_norm_is_not_normalized(tmp_path: Path) -> None:
    encoder = text_encoder.load(str(tiny_t5(tmp_path)), 8)
    with pytest.raises(UserError, match=r"text.normalize: is for an encoder whose last layer is a LayerNorm"):
        text_normalization.output_norm(encoder)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["stage2.init_from=runs/a/pipeline"], "runs/a/pipeline reads the states of its own encoder"),
        (["data.streaming=true"], "needs all captions before it starts"),
    ],
)
def test_states_are_normalized_for_a_new_model_that_reads_text(root: Path, keys: list[str], message: str) -> None:
    with pytest.raises(UserError, match=rf"text.normalize: .*{message}"):
        loader.load(root / "configs/tiny.yaml", ["text.normalize=true", *keys])

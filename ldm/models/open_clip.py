"""An OpenCLIP text tower → transformers' `CLIPTextModel` and `CLIPTokenizer`, so that no other code treats it apart."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.utils.errors import UserError

# Keys of a tower's configuration that CLIPTextModel has too, or that don't change the token states.
SUPPORTED = {
    "context_length",
    "vocab_size",
    "width",
    "heads",
    "layers",
    "mlp_ratio",
    "eos_id",
    "pool_type",
    "proj_bias",
    "proj_type",
    "output_tokens",
    "act_kwargs",
    "norm_kwargs",
}
MODEL_SCHEMAS = ("local-dir", "hf-hub")  # prefixes of names that hold both configuration and weights
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def load(name: str) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """Encoder and tokenizer of `ARCH:WEIGHTS`, `local-dir:FOLDER` or `hf-hub:ID`, which are OpenCLIP's names.

    WEIGHTS is one of OpenCLIP's tags or a safetensors file. UserError if there is no such tower, if it is not CLIP's
    causal transformer over CLIP's vocabulary, and if the weights were trained with another GELU.
    """
    open_clip = _package(name, "text.model")
    simple_tokenizer = open_clip.SimpleTokenizer()

    def check_tower(config: dict[str, Any]) -> None:
        _check_tower(name, config["text_cfg"], simple_tokenizer.vocab_size, open_clip.CLIPTextCfg())

    model = _create(name, "text.model", open_clip, check_tower)
    tower = getattr(model, "text", model)  # CustomTextCLIP has a `text`; CLIP itself holds the tower's modules
    return convert(tower), tokenizer(simple_tokenizer, tower.context_length)


def load_whole(name: str, key: str) -> tuple[Any, Any, dict[str, Any]]:
    """OpenCLIP's own model of a name as `load` has it, its tokenizer, and how it wants images (`mean`, `std`, `size`).

    UserError, which begins with `key`, if there is none.
    """
    open_clip = _package(name, key)
    model = _create(name, key, open_clip, lambda _: None)
    has_weights = name.partition(":")[0] in MODEL_SCHEMAS
    tokenizer = open_clip.get_tokenizer(name if has_weights else name.partition(":")[0])
    return model, tokenizer, open_clip.get_model_preprocess_cfg(model)


def _package(name: str, key: str) -> Any:
    try:
        import open_clip
    except ImportError:
        raise UserError(
            f"{key}: open_clip:{name} needs the package open_clip_torch; install the extra 'open-clip'"
        ) from None
    return open_clip


def _create(name: str, key: str, open_clip: Any, check_config: Callable[[dict[str, Any]], None]) -> Any:
    """OpenCLIP's model with its weights, after the checks that need no weights."""
    schema, _, rest = name.partition(":")
    has_weights = schema in MODEL_SCHEMAS
    if schema == "local-dir" and not any(Path(rest).glob("*.safetensors")):
        raise UserError(f"{key}: {rest!r} holds no .safetensors; weights are read from nothing else here")
    if not has_weights:
        _check_architecture(name, schema, key, open_clip)
    try:
        config = open_clip.get_model_config(name if has_weights else schema)
        config["text_cfg"]
    except Exception as error:  # OpenCLIP's own checks raise all kinds
        raise _failed(name, key, error) from None
    check_config(config)
    if not has_weights:
        _check_weights(schema, rest, key, bool(config.get("quick_gelu")), open_clip)
    try:
        return open_clip.create_model(*([name] if has_weights else [schema, rest]), require_pretrained=True)
    except Exception as error:
        raise _failed(name, key, error) from None


def convert(tower: Any) -> CLIPTextModel:
    """The same encoder as `CLIPTextModel`: its last hidden state is the tower's token states after `ln_final`."""
    blocks = tower.transformer.resblocks
    act = blocks[0].mlp.gelu
    hidden_act = "quick_gelu"
    if isinstance(act, nn.GELU):
        hidden_act = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[act.approximate]
    vocab_size, width = tower.token_embedding.weight.shape
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        max_position_embeddings=tower.context_length,
        layer_norm_eps=tower.ln_final.eps,
        hidden_act=hidden_act,
        pad_token_id=0,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
    )
    tensors = {
        "embeddings.token_embedding.weight": tower.token_embedding.weight,
        "embeddings.position_embedding.weight": tower.positional_embedding,
        **_weight_and_bias("final_layer_norm", tower.ln_final),
    }
    for i, block in enumerate(blocks):
        layer = f"encoder.layers.{i}"
        for kind, tensor in (("weight", block.attn.in_proj_weight), ("bias", block.attn.in_proj_bias)):
            for letter, projection in zip("qkv", tensor.chunk(3), strict=True):
                tensors[f"{layer}.self_attn.{letter}_proj.{kind}"] = projection
        tensors |= _weight_and_bias(f"{layer}.self_attn.out_proj", block.attn.out_proj)
        tensors |= _weight_and_bias(f"{layer}.layer_norm1", block.ln_1) | _weight_and_bias(
            f"{layer}.layer_norm2", block.ln_2
        )
        tensors |= _weight_and_bias(f"{layer}.mlp.fc1", block.mlp.c_fc) | _weight_and_bias(
            f"{layer}.mlp.fc2", block.mlp.c_proj
        )
    model = CLIPTextModel(config)
    model.load_state_dict(tensors)
    return model


def tokenizer(simple_tokenizer: Any, length: int) -> CLIPTokenizer:
    """OpenCLIP's `SimpleTokenizer` as a CLIPTokenizer that pads with id 0, without its repairs of broken Unicode."""
    vocabulary = {simple_tokenizer.decoder[i]: i for i in range(simple_tokenizer.vocab_size - 2)}
    vocabulary |= {BOS: simple_tokenizer.sot_token_id, EOS: simple_tokenizer.eot_token_id}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=list(simple_tokenizer.bpe_ranks),
        model_max_length=length,
        pad_token=simple_tokenizer.decoder[0],
        split_special_tokens=True,  # id 0 is "!": otherwise each "!" in a caption would be padding
    )


def _weight_and_bias(name: str, layer: Any) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}


def _check_architecture(name: str, architecture: str, key: str, open_clip: Any) -> None:
    architectures = open_clip.list_models()
    if architecture not in architectures:
        close = difflib.get_close_matches(architecture, architectures, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "open_clip.list_models() lists them"
        raise UserError(f"{key}: open_clip:{name}: OpenCLIP has no architecture {architecture!r}; {hint}")


def _check_tower(name: str, text: dict[str, Any], vocab_size: int, defaults: Any) -> None:
    differences = [
        f"{key}: {value}"
        for key, value in text.items()
        if key not in SUPPORTED and value != getattr(defaults, key, None)
    ]
    if text.get("vocab_size", vocab_size) != vocab_size:
        differences.append(f"vocab_size: {text['vocab_size']}")
    if differences:
        raise UserError(
            f"text.model: the text tower of {name} is not CLIP's ({', '.join(differences)}); take one that is, as of "
            "ViT-H-14"
        )


def _check_weights(architecture: str, weights: str, key: str, quick_gelu: bool, open_clip: Any) -> None:
    tag = open_clip.get_pretrained_cfg(architecture, weights)
    if not tag and Path(weights).is_file():
        if Path(weights).suffix != ".safetensors":
            raise UserError(f"{key}: {weights} is no .safetensors; weights are read from nothing else here")
    elif not tag:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise UserError(
            f"{key}: {weights!r} is neither a file nor a tag of {architecture}; give a .safetensors"
            + (f" or one of {', '.join(tags)}" if tags else "")
        )
    elif bool(tag.get("quick_gelu")) != quick_gelu:  # OpenCLIP would only warn, and compute other states
        other = architecture.removesuffix("-quickgelu") if quick_gelu else f"{architecture}-quickgelu"
        raise UserError(
            f"{key}: {weights} of {architecture} was trained with{'out' * quick_gelu} QuickGELU; "
            f"take open_clip:{other}:{weights}"
        )


def _failed(name: str, key: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{key}: OpenCLIP can't load {name!r}: {type(error).__name__}: {reason}")

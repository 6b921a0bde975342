"""Learned words in files: `RUN/embeddings`, and what diffusers and programs for the desktop write.

| names of the tensors | the word | written by |
|---|---|---|
| the word itself | that name | diffusers |
| `emb_params` | the file's name | A1111, ComfyUI: Stable Diffusion 1 and 2 |
| `clip_l`, `clip_g` | the file's name | the same, diffusers too: SDXL |
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import torch
from safetensors.torch import save_file

from ldm.models.adapters.base_usage import diffusers_code, model_options
from ldm.models.adapters.token_embedding import add_embedding, learned_rows
from ldm.models.convert.safetensors_file import opened
from ldm.models.finite import check_weights
from ldm.models.text_encoder import AnyTextEncoder
from ldm.models.weight_files import contents
from ldm.utils.atomic_files import atomic_folder
from ldm.utils.errors import UserError

DIFFUSERS_FILE = "learned_embeds.safetensors"  # the name that `load_textual_inversion` looks for in a folder
DESKTOP_KEY = "emb_params"
SDXL_KEYS = ("clip_l", "clip_g")
TOKEN = "token"  # of a file's metadata: the word, where the file's name can't be it
CARD = "README.md"


def write_embeddings(
    folder: Path, encoder: AnyTextEncoder, token: str, base: str = "", base_config: str = "", prompt: str = ""
) -> None:
    """Writes the rows that `add_token` added for a word, atomically, with a card that says how programs load them.

    `base` is the model's name, `base_config` the pipeline that configures it where it is a single file, `prompt` an
    example with the word. UserError where the rows are not finite.
    """
    rows = [row.float().cpu().contiguous() for row in learned_rows(encoder)]
    check_weights({f"embedding of {token}": row for row in rows}, folder)
    stem = file_stem(token)
    is_clip = all(part.model.config.model_type.startswith("clip") for part in encoder.encoders)
    with atomic_folder(folder) as tmp_path:
        if len(rows) > 1:
            save_file(dict(zip(SDXL_KEYS, rows, strict=True)), tmp_path / f"{stem}.safetensors", {TOKEN: token})
        else:
            save_file({token: rows[0]}, tmp_path / DIFFUSERS_FILE)
            if is_clip:
                save_file({DESKTOP_KEY: rows[0]}, tmp_path / f"{stem}.safetensors", {TOKEN: token})
        (tmp_path / CARD).write_text(card(token, rows, is_clip, base, base_config, prompt), "utf-8")


def file_stem(token: str) -> str:
    """The name of a word's file, which is the word itself in programs for the desktop: `cat-toy` of `<cat-toy>`."""
    stem = re.sub(r"[^\w.-]+", "-", token).strip("-.") or "embedding"
    return f"{stem}-word" if f"{stem}.safetensors" == DIFFUSERS_FILE else stem


def card(token: str, rows: list[torch.Tensor], is_clip: bool, base: str, base_config: str, prompt: str) -> str:
    """The text of `README.md`."""
    stem, base = file_stem(token), base or "BASE"
    prompt = prompt or f"a photo of {token}"
    count = f"{len(rows[0])} vector{'s' * (len(rows[0]) > 1)}"
    load = [f'pipe.load_textual_inversion("FOLDER/{DIFFUSERS_FILE}")']
    if len(rows) > 1:
        load = [
            f'rows = load_file("FOLDER/{stem}.safetensors")',
            *(
                f'pipe.load_textual_inversion(rows["{key}"], token={json.dumps(token)}, '
                f"text_encoder=pipe.text_encoder{part}, tokenizer=pipe.tokenizer{part})"
                for key, part in zip(SDXL_KEYS, ("", "_2"), strict=True)
            ),
        ]
    desktop = [
        f"- ComfyUI: copy `{stem}.safetensors` into `models/embeddings`; write `embedding:{stem}` in the prompt.",
        f"- A1111, Forge: copy it into `embeddings`; write `{stem}` in the prompt.",
    ]
    lines = [
        f"# {token}",
        "",
        f"A word for `{base}`, learned by textual inversion: {count}. The model itself is unchanged.",
        "",
        "`FOLDER` is the folder of this file.",
        "",
        "```python",
        *(["from safetensors.torch import load_file"] if len(rows) > 1 else []),
        *diffusers_code(base, len(rows) > 1, base_config),
        *load,
        f"image = pipe({json.dumps(prompt, ensure_ascii=False)}).images[0]",
        "```",
        "",
        *(desktop if is_clip else []),
        f"- This package: `ldm-txt2img {model_options(base, base_config)} --embedding FOLDER --prompt "
        f"{shlex.quote(prompt)}`",
        "",
    ]
    return "\n".join(lines)


def add_embedding_file(encoder: AnyTextEncoder | None, name: str | Path, option: str = "--embedding") -> str:
    """Gives a text encoder the word of a file, or of a run's folder or its `embeddings`, and returns the word.

    UserError, which names `option`, for another file, and for a word that the encoder knows or that doesn't fit.
    """
    path = _file(Path(name), option)
    source = f"{option}: {path}"
    if not encoder:
        raise UserError(f"{source}: the model reads no text; leave it out")
    try:
        with opened(path) as file:
            names, token = sorted(file.keys()), (file.metadata() or {}).get(TOKEN, path.stem)
            tensors = {key: file.get_tensor(key) for key in names} if len(names) <= len(SDXL_KEYS) else {}
    except UserError as error:
        raise UserError(f"{option}: {error}") from None
    keys = SDXL_KEYS if set(names) == {*SDXL_KEYS} else tuple(names)
    if (keys != SDXL_KEYS and len(names) != 1) or any(tensors[name].dim() not in (1, 2) for name in names):
        raise UserError(f"{source}: holds {contents(set(names))}, no learned word; give the file of an embedding")
    if len(keys) != len(encoder.encoders):
        made_for = f"{len(keys)} text encoder{'s' * (len(keys) > 1)}"
        raise UserError(f"{source}: was made for {made_for}, and the model has {len(encoder.encoders)}; leave it out")
    if keys not in (SDXL_KEYS, (DESKTOP_KEY,)):
        token = names[0]
    if len(token.split()) != 1:
        raise UserError(f"{source}: its word would be {token!r}; rename the file to a name without spaces")
    add_embedding(encoder, token, [tensors[key] for key in keys], source)
    return token


def _file(path: Path, option: str) -> Path:
    """The file that a path means: itself, or that in a folder; UserError if it is not clear."""
    if not path.is_dir():
        return path
    folder = path / "embeddings" if (path / "embeddings").is_dir() else path
    if (folder / DIFFUSERS_FILE).exists():
        return folder / DIFFUSERS_FILE
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{option}: {folder} has {len(files)} .safetensors; name one of an embedding")
    return files[0]

"""`finetune`: what of a loaded model is trained, instead of all of it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from ldm.config import rules
from ldm.config.schema.base import LocalPath, Section

ADAPTERS = ("lora", "dora", "lokr", "loha")


class FinetuneConfig(Section):
    kind: Literal["full", "lora", "dora", "lokr", "loha", "inversion"] = "full"
    """What is trained: all weights; an adapter of a frozen U-Net; or the embedding of a new word, textual inversion."""
    rank: PositiveInt = 16
    """Rank of an adapter's matrices."""
    alpha: float | None = Field(default=None, gt=0)
    """An adapter's change is scaled by alpha / rank; default: the rank, so by 1."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is dropped in training; lora and dora."""
    targets: Literal["attention", "linear", "all"] = "attention"
    """Layers that get an adapter: the attention's projections; all layers of the transformers; convolutions too."""
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    """Other ranks of some layers, by a part of their name or a regular expression: `{attn2: 32}`."""
    text_encoder: bool = False
    """Gives the text encoder an adapter too; text embeddings are then not cached."""
    base_precision: Literal["no", "bf16", "fp16", "8bit", "4bit"] = "no"
    """Precision of the frozen weights; `fp16` needs `run.precision: fp16`. `8bit` and `4bit`, of lora and inversion,
    need bitsandbytes and a GPU."""
    merge: bool = False
    """Writes the pipeline with the adapter merged into its weights, too."""
    token: str = ""
    """Inversion: the new word, which captions contain, such as `<cat-toy>`."""
    initializer: str = ""
    """Inversion: words whose embeddings the new word starts from: `toy`."""
    vectors: PositiveInt = 1
    """Inversion: embeddings of the new word, which takes so many tokens."""
    prior_weight: float | None = Field(default=None, gt=0)
    """Prior preservation: weight of the loss of each image of the class, which keeps it from being forgotten; 1 counts
    it like an image of the subject."""
    class_prompt: str = ""
    """Prior preservation: caption of the images of the class, `a photo of a dog`."""
    class_images: LocalPath | None = None
    """Prior preservation: a folder of images of the class; default: the model that the training starts from draws
    them."""
    num_class_images: PositiveInt = 100
    """Prior preservation: images of the class that are drawn."""

    @property
    def adapter(self) -> bool:
        """Whether the U-Net is frozen and gets an adapter."""
        return self.kind in ADAPTERS

    @property
    def deliverable(self) -> str:
        """The folder of a run's result, which stands last: where it is, the run is finished."""
        if self.kind == "full" or self.merge:
            return "pipeline"
        return "lora" if self.adapter else "embeddings"

    @property
    def deliverables(self) -> tuple[str, ...]:
        """All folders of a run's result, the last one last."""
        return ("lora", "pipeline") if self.merge else (self.deliverable,)

    @model_validator(mode="after")
    def _rules(self) -> Self:
        return rules.check(self, rules.FINETUNE)

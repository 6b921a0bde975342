"""Keys that every training shares: steps, batch, optimizer, weight averages, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from ldm.config import rules
from ldm.config.schema.base import Section

WIDEST = 12**-0.5  # σ_rel of the plain mean of all weights so far


def _check_widths(widths: tuple[float, ...]) -> tuple[float, ...]:
    if not all(0 < width < WIDEST for width in widths):
        raise ValueError(f"each must be more than 0 and less than {WIDEST:.4f}; 0.05 and 0.1 are usual")
    if len(set(widths)) < len(widths):
        raise ValueError("an entry is listed twice; name each once")
    return widths


Decay = Annotated[float, Field(ge=0, lt=1)]


class Training(Section):
    """Keys that every training shares."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch: PositiveInt = 16
    """Global batch: the images of one optimizer step, over all processes."""
    device_batch: PositiveInt | None = None
    """Images that one device computes at once, at most; gradients accumulate until the batch is complete. Default: the
    device's whole share of the batch."""
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "schedulefree", "muon", "adafactor", "lion"] = "adamw"
    """`adamw8bit` keeps its moments in 8 bits: a quarter of their memory; needs `ldm[8bit]`. `prodigy` finds its step
    size, `schedulefree` needs no schedule, `muon`, `adafactor` and `lion` take less memory; they need
    `ldm[optimizers]`. See [Optimizers](../guides/training.md#optimizers)."""
    lr: float = Field(default=1e-4, gt=0)
    """Learning rate, not scaled by batch or processes. Of `prodigy` a factor: 1."""
    muon_lr: float | None = Field(default=None, gt=0)
    """`muon`'s rate for hidden matrices, times max(1, outputs / inputs)^½; null: `lr` times 0.2 · max(both)^½. A
    discriminator's is as much larger than its `lr`."""
    lr_warmup_steps: int = Field(default=100, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"
    """Schedule of the learning rate after the warm-up; `cosine` and `linear` end at 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay, as AdamW's."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decay of the averages of gradients and of their squares. What each optimizer does with them is in its guide."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    ema_decay: Decay = 0.999
    """Decay of the averaged weights, which are saved and sampled; no effect with `schedulefree`, which averages too."""
    ema_widths: Annotated[tuple[float, ...], AfterValidator(_check_widths)] = ()
    """Power-function averages instead, by σ_rel: `[0.05, 0.1]`. The first is saved and sampled; all are snapshotted."""
    ema_snapshot_every: PositiveInt = 500
    """Steps between their snapshots, from which averages of other widths can be computed later."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints."""
    gradient_checkpointing: bool = False
    """Recomputes activations in the backward pass: less memory, a third more time."""

    @model_validator(mode="after")
    def _training_rules(self) -> Self:
        return rules.check(self, rules.TRAINING)

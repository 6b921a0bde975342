"""How fast pictures are drawn, beside diffusers: `scripts/benchmark.py sample`."""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from benchmark_rows import Memory, Report, Row, forget_peak, rows, timed
from diffusers import DiffusionPipeline

from ldm.config.schema import RunConfig
from ldm.distributed.launch import precision
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError
from ldm.utils.precision import DTYPES


def beside_diffusers(args: argparse.Namespace) -> None:
    """Prints a line each of diffusers' pipeline and of ours, in float32 and in our scripts' precision.

    The best of some rounds in which all take turns, so that what else the machine does is in none alone.
    """
    name, batch, count = args.model, args.batch, args.count or args.batch
    plain = LatentDiffusion.load(name, "cpu")
    if not plain.text or plain.task != "generate":
        raise UserError(f"--model: {name} makes no pictures from text alone; give one that does")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = args.precision or precision(RunConfig())
    asked = rows(args.rows or "diffusers-no,ours-no,diffusers,ours", ("diffusers", "ours"), chosen)
    memory, drawers = MemoryByRow(), dict[Row, Callable[[list[str]], Any]]()
    for row in asked:
        with memory.measured(row):
            drawers[row] = _drawer(row, name, plain, device, batch, args.compile)
    print(
        f"machine  {os.cpu_count()} cores, {device}, {torch.get_num_threads()} threads; {plain.side} px, {plain.steps} "
        f"steps of {type(plain.scheduler).__name__}, guidance {plain.guidance}",
        flush=True,
    )
    best: dict[tuple[Row, int], float] = {}
    for turn in range(args.rounds + 1):  # the first, in which caches and kernels are made, is beaten by the others
        for (row, drawn), number in itertools.product(drawers.items(), dict.fromkeys((1, count))):
            with memory.measured(row, number):
                best[row, number] = min(_seconds(drawn, number, turn), best.get((row, number), math.inf))
    for number in dict.fromkeys((1, count)):
        what = "one picture" if number == 1 else ("" if number == batch else f"{number} in ") + f"batches of {batch}"
        table = Report.of(f"sampling {what}", "img/s", args)
        for row in asked:
            took = best[row, number]
            title = row.name + (f", {args.compile}" if row.who == "ours" and args.compile != "no" else "")
            table.row(title, number / took, f"{took:8.3f} s", memory.peak(row, number), seconds=took)
        both = {
            row.precision for row in asked if {Row(who, row.precision) for who in ("diffusers", "ours")} <= {*asked}
        }
        for each in sorted(both):
            ratio = best[Row("diffusers", each), number] / best[Row("ours", each), number]
            print(f"sampling {what} in the same precision, {each}: ours is {ratio:.2f} × diffusers", flush=True)


class MemoryByRow:
    """Peaks of each row on a GPU, without what the other rows' pipelines hold there: all stay between their turns.

    What the allocator reserves it shares, and a process's memory is not any row's: both are left out.
    """

    def __init__(self) -> None:
        self._held: dict[Row, int] = {}  # bytes of tensors between a row's turns
        self._peaks: dict[tuple[Row, int], int] = {}  # of the last turn

    @contextmanager
    def measured(self, row: Row, number: int = 0) -> Iterator[None]:
        """Within it, nothing but this row's code allocates; its pipeline is made so, too."""
        if not torch.cuda.is_available():
            yield
            return
        others = self._allocated() - self._held.get(row, 0)
        forget_peak()
        yield
        self._peaks[row, number] = torch.cuda.max_memory_allocated() - others
        self._held[row] = self._allocated() - others

    def peak(self, row: Row, number: int) -> Memory:
        peak = self._peaks.get((row, number))
        return Memory(None if peak is None else peak / 2**20, None)

    @staticmethod
    def _allocated() -> int:
        gc.collect()  # or what one row left behind would be freed in another's turn
        return torch.cuda.memory_allocated()


def _drawer(
    row: Row, name: str, plain: LatentDiffusion, device: torch.device, batch: int, compiled: str
) -> Callable[[list[str]], Any]:
    """What draws pictures of prompts, so many at once."""
    if row.overrides:
        raise UserError(
            f"--rows: {row.name!r} has keys of a configuration, which a finished pipeline has not; drop them"
        )
    if row.who == "ours":
        model = copy.deepcopy(plain).to(device).optimize_for_inference(row.precision, compiled)
        return lambda prompts: model(prompts, batch=batch)
    theirs = DiffusionPipeline.from_pretrained(name, dtype=DTYPES[row.precision], use_safetensors=True).to(device)
    theirs.set_progress_bar_config(disable=True)

    def draw(prompts: list[str]) -> None:
        for start in range(0, len(prompts), batch):
            theirs(prompts[start : start + batch], num_inference_steps=plain.steps, guidance_scale=plain.guidance)

    return draw


def _seconds(drawn: Callable[[list[str]], Any], number: int, turn: int) -> float:
    return timed(partial(drawn, [f"picture {i} of turn {turn}" for i in range(number)]))  # none is known from before

"""Speed of sampling against diffusers: `scripts/benchmark.py sample`."""

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
from benchmark_rows import Memory, Report, Row, parse_rows, reset_peak, timed
from diffusers import DiffusionPipeline

from ldm.config.schema import RunConfig
from ldm.distributed.launch import precision
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError
from ldm.utils.precision import DTYPES

Sampler = Callable[[list[str]], Any]  # prompts → images


def compare_sampling(args: argparse.Namespace) -> None:
    """Prints a line per row: by default diffusers' pipeline and ours, in float32 and in our scripts' precision.

    A row's time is its fastest round. The rows take turns, so that other load on the machine hits all of them.
    """
    name, batch, count = args.model, args.batch, args.count or args.batch
    model = LatentDiffusion.load(name, "cpu")
    if not model.text or model.task != "generate":
        raise UserError(f"--model: {name} generates no images from text alone; name a text-to-image model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = args.precision or precision(RunConfig())
    rows = parse_rows(args.rows or "diffusers-no,ours-no,diffusers,ours", ("diffusers", "ours"), default)
    memory, samplers = MemoryByRow(), dict[Row, Sampler]()
    for row in rows:
        with memory.measured(row):
            samplers[row] = _sampler(row, name, model, device, batch, args.compile)
    print(
        f"machine  {os.cpu_count()} cores, {device}, {torch.get_num_threads()} threads; {model.side} px, {model.steps} "
        f"steps of {type(model.scheduler).__name__}, guidance {model.guidance}",
        flush=True,
    )
    fastest: dict[tuple[Row, int], float] = {}
    for turn in range(args.rounds + 1):  # the first is slower: it fills caches and compiles kernels
        for (row, sampler), number in itertools.product(samplers.items(), dict.fromkeys((1, count))):
            with memory.measured(row, number):
                fastest[row, number] = min(_seconds(sampler, number, turn), fastest.get((row, number), math.inf))
    for number in dict.fromkeys((1, count)):
        what = "one image" if number == 1 else ("" if number == batch else f"{number} in ") + f"batches of {batch}"
        report = Report.of(f"sampling {what}", "img/s", args)
        for row in rows:
            seconds = fastest[row, number]
            title = row.name + (f", {args.compile}" if row.subject == "ours" and args.compile != "no" else "")
            report.row(title, number / seconds, f"{seconds:8.3f} s", memory.peak(row, number), seconds=seconds)
        for dtype in sorted({row.precision for row in rows}):
            pair = Row("diffusers", dtype), Row("ours", dtype)
            if {*pair} <= {*rows}:
                ratio = fastest[pair[0], number] / fastest[pair[1], number]
                print(f"sampling {what} in the same precision, {dtype}: ours is {ratio:.2f} × diffusers", flush=True)


class MemoryByRow:
    """Each row's peak on a GPU, without the other rows' pipelines, which stay there between their turns.

    The allocator's reserve and a process's memory belong to all rows together: both are left out.
    """

    def __init__(self) -> None:
        self._held: dict[Row, int] = {}  # bytes of tensors between a row's turns
        self._peaks: dict[tuple[Row, int], int] = {}  # of the last turn

    @contextmanager
    def measured(self, row: Row, number: int = 0) -> Iterator[None]:
        """Measures its body, in which only this row's code may allocate; a row's pipeline must be loaded in one too."""
        if not torch.cuda.is_available():
            yield
            return
        others = self._allocated() - self._held.get(row, 0)
        reset_peak()
        yield
        self._peaks[row, number] = torch.cuda.max_memory_allocated() - others
        self._held[row] = self._allocated() - others

    def peak(self, row: Row, number: int) -> Memory:
        peak = self._peaks.get((row, number))
        return Memory(None if peak is None else peak / 2**20, None)

    @staticmethod
    def _allocated() -> int:
        gc.collect()  # or one row's garbage would be freed in another's turn
        return torch.cuda.memory_allocated()


def _sampler(row: Row, name: str, model: LatentDiffusion, device: torch.device, batch: int, compiled: str) -> Sampler:
    """The row's pipeline, as a function of prompts."""
    if row.overrides:
        raise UserError(f"--rows: {row.name!r} has configuration keys, which a finished pipeline lacks; drop them")
    if row.subject == "ours":
        optimized = copy.deepcopy(model).to(device).optimize_for_inference(row.precision, compiled)
        return lambda prompts: optimized(prompts, batch=batch)
    dtype = DTYPES[row.precision]
    pipeline = DiffusionPipeline.from_pretrained(name, dtype=dtype, use_safetensors=True).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def sample(prompts: list[str]) -> None:
        for start in range(0, len(prompts), batch):
            pipeline(prompts[start : start + batch], num_inference_steps=model.steps, guidance_scale=model.guidance)

    return sample


def _seconds(sampler: Sampler, number: int, turn: int) -> float:
    prompts = [f"image {i} of turn {turn}" for i in range(number)]  # new ones: encoded prompts may be cached
    return timed(partial(sampler, prompts))

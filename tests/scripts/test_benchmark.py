"""The benchmarks run and print figures; no test says how fast anything is."""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import multiprocessing
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmark_fixtures
import benchmark_latency
import benchmark_results
import benchmark_rows
import benchmark_sampling
import benchmark_training
import pytest
import torch

from ldm.config.loader import Config
from ldm.data.index import Index
from ldm.models import text_encoder
from ldm.models.autoencoder import Autoencoder
from ldm.utils.errors import UserError

ROW = re.compile(
    r"training (\w+, \w+) +([\d,.]+) img/s +([\d.]+) × +([\d,.]+) GFLOP/s, +(\d+)% of ([\d,.]+) +([\d,]+) MB"
)
SMALLEST = [
    "data.size=16",
    "stage1.channels=[16, 16]",
    "stage2.channels=[8, 8]",
    "stage2.norm_num_groups=4",
    "stage2.batch=8",
    "text.max_tokens=8",
]


@pytest.fixture
def benchmark(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(root / "scripts")  # as for `python scripts/benchmark.py`
    return importlib.import_module("benchmark")


@pytest.fixture
def main(benchmark: Any) -> Any:
    return benchmark.main


@pytest.mark.slow
def test_training_is_measured_next_to_the_reference_in_both_precisions(
    main: Any,
    call: Callable[..., str],
    root: Path,
    three_shapes: Callable[[list[str]], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forks = multiprocessing.get_context("fork")  # of this process, which has imported everything already
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: forks)
    overrides = [f"data.source={three_shapes(['cat', 'dog', 'red heart'] * 3)}", "run.precision=bf16", *SMALLEST]
    output = call(main, "train", "--config", root / "configs/tiny.yaml", "--steps", 4, *overrides)
    rows = {name: [float(x.replace(",", "")) for x in figures] for name, *figures in ROW.findall(output)}
    assert [*rows] == ["reference, no", "reference, bf16", "ours, bf16"], output
    for rate, ratio, flops, _, peak, memory in rows.values():
        assert min(rate, flops, peak, memory) > 0
        assert ratio == pytest.approx(rate / rows["reference, no"][0], abs=0.02, rel=0.02)
    ratio = float(re.search(r"ours is ([\d.]+) × the reference", output)[1])
    assert ratio == pytest.approx(rows["ours, bf16"][0] / rows["reference, bf16"][0], abs=0.02, rel=0.02)


def test_waiting_for_checkpoints_is_measured_and_none_is_kept(
    main: Any, call: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    file = tmp_path / "results.jsonl"
    output = call(main, "checkpoint", "--parameters", "0.1M", "--out", tmp_path / "out", "--json", file)
    assert output.count("s of waiting, written after") == 3
    reference, first, following = benchmark_results.read(file)
    assert (reference["row"], first["row"], following["row"]) == ("reference", "ours, first", "ours, next")
    for line in (reference, first, following):
        assert 0 < line["waited"] <= line["written"]
        assert line["ratio"] == pytest.approx(reference["waited"] / line["waited"])
    assert not any((tmp_path / "out").iterdir())


def test_waiting_for_slow_reads_is_measured_with_the_loaders_own_order(
    main: Any,
    call: Callable[..., str],
    root: Path,
    three_shapes: Callable[[list[str]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmark_latency, "DELAYS", ((0.02, 0.05), (0.1, 0.01)))
    file, images = tmp_path / "results.jsonl", three_shapes(["cat", "dog", "red heart"] * 3)
    rows = "plain+data.workers=0,ours+data.workers=1+data.prefetch_factor=4"
    command = ("latency", "--config", root / "configs/tiny.yaml", "--steps", 8, "--step-seconds", 0.002)
    output = call(main, *command, "--rows", rows, "--json", file, f"data.source={images}", *SMALLEST)
    assert "steps of 2 ms, 8 samples; reads of 1 ms, 10.0% of 0.01 s, 2.0% of 0.05 s; 8 steps" in output
    plain, ours = benchmark_results.read(file)
    assert (plain["row"], ours["row"]) == ("plain, workers=0", "ours, workers=1, prefetch_factor=4")
    for line in (plain, ours):
        assert line["p50"] <= line["p99"] <= line["p99.9"] <= line["max"]
    assert plain["value"] < 1 / (0.002 + 2 * 8 * 0.001)
    assert plain["p50"] > 2 * 8 * 1.0  # milliseconds: two reads of eight samples, one after another


@pytest.mark.parametrize(("u", "seconds"), [(0.0, 2.0), (0.0009, 2.0), (0.0011, 0.1), (0.0109, 0.1), (0.0111, 0.001)])
def test_a_read_is_slow_as_often_as_the_shares_say(u: float, seconds: float) -> None:
    assert benchmark_latency.delay(u) == seconds


def test_the_chosen_row_alone_is_measured_and_appended_as_json(
    main: Any, call: Callable[..., str], root: Path, three_shapes: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    file, images = tmp_path / "results.jsonl", three_shapes(["cat", "dog", "red heart"] * 3)
    earlier = {"what": "training", "row": "reference, no", "value": 2.0, **benchmark_results.machine()}
    benchmark_results.append(file, earlier)
    output = call(
        main,
        "train",
        "--config",
        root / "configs/tiny.yaml",
        "--steps",
        4,
        "--rows",
        "ours-no+stage2.device_batch=4",
        "--json",
        file,
        "--label",
        6,
        "--baseline",
        "reference, no",
        f"data.source={images}",
        *SMALLEST,
    )
    assert len(re.findall("^training ", output, re.MULTILINE)) == 1
    kept, line = benchmark_results.read(file)
    assert kept == earlier
    assert line["step"] == 6 and line["row"] == "ours, no, device_batch=4" and line["unit"] == "img/s"
    assert line["baseline"] == 2.0 and line["ratio"] == line["value"] / 2
    assert line["allocated"] > 0 and line["loss_scale"] == 1 and line["skipped"] == 0 and 0 < line["mfu"] < 1
    assert line["gpu"] is None and line["reserved"] is None and line["torch"] == torch.__version__


def test_a_measured_run_writes_no_weights(
    drawings: Callable[..., tuple[Config, Index]], vae: Autoencoder, words: Path
) -> None:
    settings, index = drawings(
        f"text.model={words}",
        "text.max_tokens=8",
        "stage1.channels=[16, 16]",
        "stage2.channels=[8, 8]",
        "stage2.norm_num_groups=4",
        "stage2.steps=4",
        "stage2.batch=2",
        "stage2.checkpoint_every=1",
        "sample.every=1",
        "run.log_every=1",
    )
    lines = benchmark_training.our_loop(settings, index, vae, text_encoder.of(settings.text))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    left = [path for path in settings.run.dir.rglob("*") if path.is_file() and "cache" not in path.parts]
    assert left == []


def test_stage_ones_rows_can_be_chosen(
    main: Any, call: Callable[..., str], root: Path, three_shapes: Callable[[list[str]], Path]
) -> None:
    output = call(
        main,
        "stage1",
        "--config",
        root / "configs/tiny.yaml",
        "--steps",
        4,
        "--rows",
        "discriminator-no+stage1.gan.layers=1",
        f"data.source={three_shapes(['cat', 'dog'])}",
        *SMALLEST,
    )
    assert re.search(r"^stage 1 +discriminator, no, gan.layers=1 +[\d.]+ img/s +1.00 × +[\d,]+ MB$", output, re.M)
    assert "plain" not in output


def test_rows_name_the_code_its_precision_and_its_overrides() -> None:
    rows = benchmark_rows.parse_rows(
        "reference-no,ours,ours-fp16+stage2.compile=true,ours", ("reference", "ours"), "bf16"
    )
    assert [row.name for row in rows] == ["reference, no", "ours, bf16", "ours, fp16, compile=true"]
    for wrong in ("other", "ours-int8", "ours+compile"):
        with pytest.raises(UserError, match=r"^--rows: .* a row is reference or ours"):
            benchmark_rows.parse_rows(wrong, ("reference", "ours"), "bf16")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system can't forget a peak")
def test_a_row_that_is_measured_in_this_process_has_its_own_peak() -> None:
    bytearray(b"x") * (256 << 20)
    before = benchmark_rows.peak().allocated
    ((_, result, memory),) = benchmark_rows.each_in_subprocess(
        lambda row: row.subject, [benchmark_rows.Row("ours", "no")]
    )
    assert result == "ours"
    assert 0 < memory.allocated < before - 100


def test_kernels_of_attention_agree(main: Any, call: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    call(main, "attention", "--batch", 1, "--size", 64, "--rounds", 1, "--precision", "no", "--json", file)
    lines = benchmark_results.read(file)
    assert [line["row"] for line in lines] == ["eager, no", "sdpa, no"]
    assert all(line["difference"] < 1e-5 for line in lines)
    assert "xformers is not installed" in call(main, "attention", "--rows", "xformers", status=2)


def test_an_earlier_figure_counts_on_the_same_machine_only(tmp_path: Path) -> None:
    file, line = tmp_path / "results.jsonl", {"what": "training", "row": "ours", **benchmark_results.machine()}
    for more in ({"value": 1.0}, {"value": 2.0}, {"value": 3.0, "gpu": "another"}, {"value": 4.0, "row": "other"}):
        benchmark_results.append(file, {**line, **more})
    assert benchmark_results.newest(file, "training", "ours") == 2.0
    assert benchmark_results.newest(tmp_path / "none", "training", "ours") is None


def test_fixtures_follow_from_a_seed_and_a_complete_folder_is_left_alone(tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.suffix in (".safetensors", ".jpg", ".txt")
        }

    for name in ("a", "b"):
        benchmark_fixtures.create_fixtures(tmp_path / name, benchmark_fixtures.TINY)
    a = files(tmp_path / "a")
    assert a == files(tmp_path / "b")
    assert {"images/000.jpg", "vae/diffusion_pytorch_model.safetensors", "text/model.safetensors"} <= a.keys()
    (tmp_path / "a/images/000.jpg").unlink()
    benchmark_fixtures.create_fixtures(tmp_path / "a", benchmark_fixtures.TINY)
    assert not (tmp_path / "a/images/000.jpg").exists()


def test_keys_that_the_reference_lacks_are_refused_in_a_line(main: Any, call: Callable[..., str], root: Path) -> None:
    tiny = root / "configs/tiny.yaml"
    output = call(main, "train", "--config", tiny, "stage2.conditions=[class]", "stage2.pooled_text=false", status=2)
    assert "set stage2.conditions=[text]" in output
    assert "Traceback" not in output


def test_sampling_is_measured_next_to_diffusers_pipeline(
    main: Any, call: Callable[..., str], tiny_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "results.jsonl"
    options = ("--model", tiny_run / "pipeline", "--batch", 2, "--count", 3, "--rounds", 1, "--precision", "no")
    printed = call(main, "sample", *options, "--json", file)
    for what in ("one image", "3 in batches of 2"):
        for row in ("diffusers, no", "ours, no"):
            assert re.search(rf"^sampling {what} {row} +[\d.]+ img/s +[\d.]+ × +[\d.]+ s$", printed, re.MULTILINE)
        assert re.search(rf"^sampling {what} in the same precision, no: ours is [\d.]+ ×", printed, re.MULTILINE)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["value"] * line["seconds"] for line in lines] == pytest.approx([1, 1, 3, 3])
    assert all(line["allocated"] is None and line["reserved"] is None for line in lines)  # a process's is not a row's


class Allocator:
    """Counts the MB that a GPU's allocator would have."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def use(self, kept: int, temporary: int = 0) -> None:
        """Allocates `kept` MB and `temporary` MB, which are freed at once."""
        self.now += kept
        self.most = max(self.most, self.now + temporary)

    def reset(self) -> None:
        self.most = self.now


@pytest.mark.parametrize("rows", ["diffusers-no,ours-no", "ours-no"])
def test_a_rows_memory_is_its_own_whatever_other_pipelines_are_there(
    main: Any, call: Callable[..., str], rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, file = Allocator(), tmp_path / "results.jsonl"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("init", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", gpu.reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: gpu.now * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: gpu.most * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: gpu.most * 2**20)
    model = SimpleNamespace(text=True, task="generate", side=8, steps=1, scheduler=None, guidance=1.0)
    monkeypatch.setattr(benchmark_sampling.LatentDiffusion, "load", lambda *_: model)

    def sampler(row: benchmark_rows.Row, *_: Any) -> Callable[[list[str]], None]:
        weights, per_image, kept = {"diffusers": (1000, 100, 0), "ours": (500, 30, 7)}[row.subject]
        gpu.use(weights, temporary=weights)
        calls = itertools.count()
        return lambda prompts: gpu.use(0 if next(calls) else kept, temporary=per_image * len(prompts))

    monkeypatch.setattr(benchmark_sampling, "_sampler", sampler)
    options = ("--model", "any", "--batch", 4, "--rounds", 2, "--precision", "no", "--rows", rows, "--json", file)
    gc.collect()
    gc.freeze()  # each turn collects garbage, which visits the objects of all tests before this one
    call(main, "sample", *options)
    measured = {
        (line["row"], line["what"]): (line["allocated"], line["reserved"]) for line in benchmark_results.read(file)
    }
    ours = {("ours, no", "sampling one image"): (537, None), ("ours, no", "sampling batches of 4"): (627, None)}
    diffusers = {
        ("diffusers, no", "sampling one image"): (1100, None),
        ("diffusers, no", "sampling batches of 4"): (1400, None),
    }
    assert measured == (ours | diffusers if "diffusers" in rows else ours)


def test_what_cannot_be_measured_is_a_line(main: Any, call: Callable[..., str], tmp_path: Path) -> None:
    assert "--model: none given" in call(main, "sample", status=2)
    assert "--config: none given" in call(main, "train", status=2)
    assert "--model: can't load" in call(main, "sample", "--model", tmp_path, status=2)
    assert "--rounds: 0; give 1 or more" in call(main, "sample", "--rounds", 0, status=2)

"""A run's report is one self-contained page that shows what the run's folder says."""

from __future__ import annotations

import json
import re
import shlex
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image
from run_folder import STEPS, noise, training_line, write_metrics, write_run

from ldm.data.images import grid
from ldm.evaluation.figures import Figure
from ldm.evaluation.report import sections, write, write_report
from ldm.evaluation.report.charts import MAX_POINTS, Series, line_chart, thin
from ldm.evaluation.report.collect import STATISTICS, collect
from ldm.evaluation.report.comparison import best_of, difference
from ldm.evaluation.report.image_data import data_uri
from ldm.evaluation.report.page import page
from ldm.models import autoencoder

VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """A parsed page: checks that tags are closed in order, and collects addresses, headings and what pointers see."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(root, tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text("utf-8")


def test_the_page_is_well_formed_and_loads_nothing(html: str) -> None:
    page = Page(html)
    assert all(address.startswith(("data:image/webp;base64,", "#")) for address in page.addresses)
    assert "url(" not in html and "@import" not in html
    targets = {address.removeprefix("#") for address in page.addresses if address.startswith("#")}
    assert targets == set(re.findall(r'<h2 id="(\w+)">', html)) >= {"samples", "figures", "extremes", "memorization"}
    assert html.count("<img ") == 2 + 4 + 2  # sheets, prompts, pairs and grid
    assert len(html) < 5_000_000


def test_curves_have_the_points_of_the_metrics(run: Path, html: str) -> None:
    expected = {f"step {step}\n{training_line(step)['loss']:.4g}" for step in STEPS}
    assert expected <= set(Page(html).text["title"])
    assert collect(run).stage2.points("loss") == [(step, training_line(step)["loss"]) for step in STEPS]
    assert "step 50\n25 [23, 27]" in Page(html).text["title"]  # a figure while training, with its interval


def test_a_line_lies_where_its_values_are() -> None:
    chart = line_chart("", [Series("", [(0, 1.0), (5, 2.0), (10, 4.0)])])
    (path,) = re.findall(r'class="line c0" d="M([^"]+)"', chart)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split()) for point in path.split("L"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert 2 * (y0 - y1) == pytest.approx(y1 - y2, abs=0.3) and y0 > y1


def test_thinning_keeps_spikes_and_the_last_point() -> None:
    points = [(float(x), 100.0 if x == 5432 else float(x % 7)) for x in range(10_000)]
    thinned = thin(points)
    assert len(thinned) <= MAX_POINTS and set(thinned) <= set(points)
    assert (5432.0, 100.0) in thinned and thinned[-1] == points[-1]


def test_figures_are_those_of_the_evaluation(html: str) -> None:
    cells = " ".join(Page(html).text["td"])
    shown = (
        "FID ↓",
        "12.5",
        "recall ↑",
        "0.5",
        "500",
        "Inception-v3, 2048",
        "3.25",
        "0.75",
        "0.0125",
        "0.625",
        "0.03125",
    )
    for expected in (*shown, "1.5", "worse", "inception, prompts shuffled"):
        assert expected in cells
    assert "<small>[11.25, 13.75]</small>" in html
    assert "805, 73 held out" in html


def test_time_is_that_of_the_steps(run: Path) -> None:
    speed = collect(run).stage2.speed(batch=16)
    assert speed and speed.seconds == pytest.approx(100 * 16 / 8.0)  # 100 steps of 16 images at 8 a second


def test_energy_is_mean_power_times_time(root: Path, tmp_path: Path) -> None:
    run = write_run(root, tmp_path / "run")
    lines = [training_line(step) | {"watts": watts} for step, watts in ((50, 2000.0), (100, 3000.0))]
    write_metrics(run / "stage2/metrics.jsonl", lines)  # 200 s at 2.5 kW
    write([run], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "energy of the GPUs" in page.text["th"] and "0.139 kWh" in page.text["td"]


def test_text_of_the_run_is_escaped(root: Path, tmp_path: Path) -> None:
    attack = "<script>alert('x')</script>\" onload=\"x"
    run = write_run(root, tmp_path / "a<b>&", prompt=attack)
    write([run], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text("utf-8")
    Page(html)
    assert html.count("<script>") == 1 and "&lt;script&gt;alert" in html and 'onload="' not in html
    assert "<b>&" not in html


def test_images_fill_their_limit_and_no_more(tmp_path: Path) -> None:
    noise(0, 256).save(tmp_path / "noise.png")
    size = len(data_uri(tmp_path / "noise.png", width=400, limit=20_000)) * 3 / 4
    assert 8_000 < size < 20_100
    assert sections.SHEETS_BYTES + 6 * sections.IMAGE_BYTES + sections.THUMBS_BYTES < 5_000_000 * 3 / 4


def test_a_broken_run_has_a_report_that_says_so(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(root, tmp_path / "run")
    with (run / "stage2/metrics.jsonl").open("a") as file:
        file.write('{"step": 105, "lo')
    (run / "stage2/samples/step-000100.png").write_bytes(b"\x89PNG\r\n")
    (run / "evaluation.json").write_text("{")
    assert write_report(run)
    notes = [line.removeprefix(f"{run}: ") for line in capsys.readouterr().err.splitlines()]
    assert notes == [
        "stage2/metrics.jsonl: 1 line is incomplete and left out",
        "evaluation.json: no JSON object, and left out",
        "samples/step-000100.png: can't be read as an image, and is left out",
    ]
    assert all(note in (run / "report.html").read_text().replace("&#x27;", "'") for note in notes)
    assert collect(run).stage2.step == 100


def test_a_failure_is_one_line_and_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_report(tmp_path / "none") is None
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_runs_side_by_side_are_told_apart_where_their_intervals_are(root: Path, tmp_path: Path, run: Path) -> None:
    other, far = (write_run(root, tmp_path / name, shift=shift) for name, shift in (("near", 1.0), ("far", 5.0)))
    write([run, other, far], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text("utf-8")
    page = Page(html)
    assert {"first", "near", "far"} <= set(page.text["th"])
    assert "first is best, can't be told apart from near" in page.text["span"]
    for name in ("first", "near", "far"):  # whose training losses are the same
        assert any(f"{name} {training_line(5)['loss']:.4g}" in title for title in page.text["title"])
    assert "near less first" in page.text["td"]  # the same prompts, image by image
    assert html.count('class="line c2"') >= 4


def settings_of_rows(html: str) -> dict[str, list[str]]:
    """The cells of *What differs*, by key."""
    table = html.partition('id="settings"')[2].partition("</table>")[0]
    rows = re.findall(r'<td>([^<]+)</td>((?:<td class="w"><code>[^<]*</code></td>)+)', table)
    return {key: re.findall(r"<code>([^<]*)</code>", unescape(cells)) for key, cells in rows}


def change(run: Path, section: str, **values: object) -> None:
    """Writes other values into a run's configuration."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["configuration"][section] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(tree))


def test_sources_differ_by_their_paths_and_by_the_options_that_are_not_the_same(root: Path, tmp_path: Path) -> None:
    a, b = (write_run(root, tmp_path / name) for name in "ab")
    (source,) = collect(a).get("data.source")
    for sources, shown in (
        ([source | {"path": "photos"}], "photos"),
        ([source | {"path": "x"}, source | {"path": "y"}], "x; y"),
        ([source | {"caption_column": "title"}], "openmoji-demo, caption_column: title"),
    ):
        change(b, "data", source=sources)
        write([a, b], tmp_path / "report.html")
        rows = settings_of_rows((tmp_path / "report.html").read_text("utf-8"))
        assert rows["data.source"][1] == shown and rows["data.source"][0].partition(",")[0] == "openmoji-demo"


def test_differing_values_are_those_of_overrides(root: Path, tmp_path: Path) -> None:
    a, b = write_run(root, tmp_path / "a", prompt="it's"), write_run(root, tmp_path / "b")
    change(b, "stage2", init_from="models/first")
    write([a, b], tmp_path / "report.html")
    rows = settings_of_rows((tmp_path / "report.html").read_text("utf-8"))
    assert rows == {"sample.prompts": ['["it\'s"]', '["red heart"]'], "stage2.init_from": ["null", "models/first"]}


def test_a_run_without_scores_keeps_its_column(root: Path, tmp_path: Path) -> None:
    scored, bare = (write_run(root, tmp_path / name) for name in ("scored", "bare"))
    write_metrics(bare / "stage2/metrics.jsonl", [training_line(step) for step in STEPS])
    (bare / "evaluation.json").unlink()
    write([scored, bare], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text("utf-8")
    assert ">Figures</h2>" in html and ">Other scores</h2>" in html
    assert '<tr><td>held-out loss</td><td class="n">0.5</td><td class="n">–</td></tr>' in html
    (scored / "evaluation.json").unlink()
    write([scored, bare], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text("utf-8")
    assert ">Scores</h2>" in html and "Other scores" not in html
    assert '<th class="n">scored</th><th class="n">bare</th>' in html


def test_frames_are_explained_where_one_is_drawn(root: Path, tmp_path: Path) -> None:
    run = write_run(root, tmp_path / "run")
    squares = [Image.new("RGB", (32, 32), "white")] * 2
    for marked in ([], [1]):
        for step in (50, 100):
            grid(squares, ["a", "b"], columns=8, marked=marked).save(run / f"stage2/samples/step-{step:06d}.png")
        assert ("Framed: prompts of held-out images." in page(collect(run))) == bool(marked)


def test_a_run_without_scores_says_how_to_measure_it(root: Path, tmp_path: Path) -> None:
    base, adapter = write_run(root, tmp_path / "a run"), write_run(root, tmp_path / "adapter")
    assert "ldm-evaluate" not in page(collect(base))
    for run, result in ((base, "pipeline"), (adapter, "lora")):
        (run / "evaluation.json").unlink()
        (run / result).mkdir()
    change(adapter, "finetune", kind="lora")
    change(adapter, "stage2", init_from=str(base / "pipeline"))
    commands = (["ldm-evaluate", str(base)], ["ldm-evaluate", str(base), "--lora", str(adapter / "lora")])
    for run, command in zip((base, adapter), commands, strict=True):
        shown = re.findall(r"<code>(ldm-evaluate [^<]*)</code>", page(collect(run)))
        assert [shlex.split(unescape(text)) for text in shown] == [command]


def test_the_command_can_be_pasted(root: Path, tmp_path: Path) -> None:
    run = write_run(root, tmp_path / "run")
    tree = yaml.safe_load((run / "config.yaml").read_text())
    for script, begins in (("a folder/train_ldm.py", ["python"]), ("train_ldm.py", ["python"]), ("bin/ldm-train", [])):
        arguments = [script, 'sample.prompts=["it\'s", "b"]']
        tree["about"]["command"] = shlex.join(arguments)
        (run / "config.yaml").write_text(yaml.safe_dump(tree))
        commands = re.findall(r"<pre>git checkout abc\n([^<]*)</pre>", page(collect(run)))
        assert [shlex.split(unescape(text)) for text in commands] == [[*begins, *arguments]]


def test_the_verdict_follows_direction_and_bars() -> None:
    a, b = Figure(1.0, 0.5, 1.5), Figure(3.0, 2.5, 3.5)
    for other, larger_is_better, expected in (
        (b, False, "a is best"),
        (b, True, "b is best"),
        (Figure(1.6, 1.4, 1.8), True, "can't be told apart"),
        (Figure(1.6), True, "no error bars"),
        (Figure(3.0, 2.5, 3.5, network="other"), True, "different networks"),
        (Figure(3.0, 2.5, 3.5, images=7), True, "different numbers of images"),
    ):
        assert expected in best_of({"a": a, "b": other}, larger_is_better, ["reference", "reference"])
    assert "training images: not comparable" in best_of({"a": a, "b": b}, True, ["reference", "other"])
    assert "not known to be comparable" in best_of({"a": a, "b": b}, True, ["reference", None])


def test_an_evaluation_of_an_earlier_step_is_left_out_and_named(root: Path, tmp_path: Path) -> None:
    run = write_run(root, tmp_path / "run")
    file = run / "evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained steps": 3}))
    result = collect(run)
    assert not result.figures and not result.samples and result.image("evaluation/grid.png") is None
    assert result.notes == ["evaluation.json: of the model at step 3, before training went on; evaluate it again"]


def test_only_files_of_the_evaluations_folder_are_shown(root: Path, tmp_path: Path) -> None:
    run = write_run(root, tmp_path / "run")
    entries = [{"prompt": "a", "file": "../../secret.png", "score": 1.0, "group": ""}, {"prompt": "b", "score": None}]
    (run / "evaluation/samples.json").write_text(json.dumps(entries))
    result = collect(run)
    assert [sample.path for sample in result.samples] == [run / "evaluation/secret.png"]
    assert result.notes == ["evaluation/samples.json: 1 entries without a score are left out"]


def test_the_autoencoders_file_has_its_name() -> None:
    assert STATISTICS == autoencoder.STATISTICS


def test_scores_are_apart_only_where_no_interval_overlaps_another() -> None:
    low, near, high = (Figure(value, value - 0.2, value + 0.2) for value in (0.3, 0.4, 0.9))
    assert difference([low, near]) == "can't be told apart"
    assert difference([low, near, high]) == "they differ"
    assert difference([low]) == ""

"""The report on one run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from ldm.evaluation.report import elements, sections
from ldm.evaluation.report.collect import Run
from ldm.evaluation.report.elements import Section

SHEETS = {
    "training-captions.png": "Prompts of training images",
    "held-out-combinations.png": "Prompts of held-out images",
    "enlarged.png": "Enlarged held-out images",
}
SCRIPT = re.compile(r"('[^']*|\S*)\.py'?(\s|$)")  # what a command begins with, quoted where its path needs it


def page(run: Run) -> str:
    """A document of HTML with everything that the run's folder knows of it."""
    images = sections.Images(run.notes)
    curves = sections.curves(sections.STAGE2_CURVES, run.stage2)
    curves[2:2] = sections.noise_levels(run.stage2)
    scores = sections.scores(run) + "".join(images.figure(run.image(name), caption) for name, caption in SHEETS.items())
    parts = [
        Section("model", "Model and data", sections.summary(run)),
        Section("samples", "Samples over time", sections.samples_over_time(run, images)),
        Section("figures", "Figures", _figures(run)),
        Section("curves", "Training", sections.chart_grid(curves)),
        Section("scores", "Scores", scores or how_to_measure(run)),
        Section("extremes", "Best and worst prompts", sections.extremes(run, images)),
        Section("memorization", "Memorisation", sections.memorization(run, images)),
        Section("grid", "Guidance and steps", images.figure(run.image("evaluation/grid.png"))),
        Section("stage1", "Autoencoder", sections.stage1(run, images)),
        Section("speed", "Time and memory", sections.training_speed(run)),
        Section("use", "Use and remake", _use(run)),
    ]
    return elements.document(run.name, lead(run), run.notes, _tiles(run), parts, foot(run))


def lead(run: Run) -> str:
    """What kind of model it is, and how far it is trained."""
    conditions = run.get("stage2.conditions", [])
    kind = "Unconditional"
    if "inpaint" in conditions:
        kind = "Inpainting"
    elif "upscale" in conditions:
        kind = "Super-resolution"
    elif "text" in conditions:
        kind = "Text-to-image"
    elif "class" in conditions:
        kind = "Class-conditional"
    space = "pixel" if run.get("stage1.model") == "identity" else "latent"
    steps, done = run.get("stage2.steps", 0), run.stage2.step
    state = f"{done:,} steps" if done >= steps else f"{done:,} of {steps:,} steps so far"
    return f"{kind} {space} diffusion, {run.get('data.size')} px, {state} on {run.sources}"


def foot(run: Run) -> str:
    return f"Made from {run.folder.resolve()}. A pointer on a chart shows its values; bars are 95 % intervals."


def _tiles(run: Run) -> str:
    """The figures that are looked for first."""
    tiles: dict[str, object] = {}
    for network, metrics in run.figures.items():
        for metric, figure in list(metrics.items())[:2]:
            tiles.setdefault(f"{sections.metric_name(metric)}, {network}", sections.with_bar(figure))
    for name, title in (("held_out_loss", "held-out loss"), ("trained_on_loss", "loss on training images")):
        if (value := run.stage2.last(name)) is not None:
            tiles[title] = elements.Raw(sections.number(value))
    psnr = run.autoencoder.get("held_out", {}).get("psnr")
    if isinstance(psnr, float):
        tiles["autoencoder, held-out PSNR"] = f"{psnr:.1f} dB"
    if unet := run.parameters.get("U-Net"):
        tiles["parameters of the U-Net"] = sections.short(unet)
    speeds = [stage.speed(int(run.get(f"{name}.batch", 0))) for name, stage in run.stages.items()]
    if seconds := sum(speed.seconds for speed in speeds if speed):
        tiles["training time"] = sections.duration(seconds)
    return elements.tiles(dict(list(tiles.items())[:6]))


def _figures(run: Run) -> str:
    final, over_steps = sections.final_figures(run), sections.figures_over_steps(run.stage2)
    return final + sections.against_another(run) + (f"<h3>While training</h3>{over_steps}" if over_steps else "")


def how_to_measure(run: Run) -> str:
    """The command that measures a run without figures and scores; empty where it has some, or none can be."""
    if run.figures or "inpaint" in run.get("stage2.conditions", []):
        return ""
    folder, base = run.folder, Path(run.get("stage2.init_from", "")).parent
    arguments, result = [str(folder)], "adds their figures and scores to this report"
    if run.get("finetune.kind", "full") != "full":
        if not (base / "config.yaml").is_file() or not (folder / "lora").is_dir():
            return ""
        arguments, result = [str(base), "--lora", str(folder / "lora")], "prints their figures and scores"
    when = (
        "Not measured yet" if any((folder / name).is_dir() for name in ("pipeline", "lora")) else "Once it is trained"
    )
    return f"<p>{when}: {elements.code(shlex.join(['ldm-evaluate', *arguments]))} draws images and {result}.</p>"


def _use(run: Run) -> str:
    """How the result is used, and the command that makes it again."""
    parts = []
    if (run.folder / "pipeline").is_dir():
        prompts = run.get("sample.prompts") or ["a red heart"]
        quoted = '"' + str(prompts[0]).replace("\\", "\\\\").replace('"', '\\"') + '"'
        argument = quoted if run.get("stage2.conditions") == ["text"] else "…"
        lines = [
            f'pipe = diffusers.DiffusionPipeline.from_pretrained("{run.folder / "pipeline"}")',
            f'pipe({argument}, num_inference_steps={run.get("sample.steps")}).images[0].save("image.png")',
        ]
        parts.append(elements.block("\n".join(lines)))
    parts.append('<p class="note">README.md in the folder is the model card. Made with:</p>')
    command, commit = (str(run.provenance.get(name, "")) for name in ("command", "git_commit"))
    python = "python " if SCRIPT.match(command) else ""
    lines = [f"git checkout {commit}"] * (commit not in ("", "unknown")) + [python + command] * bool(command)
    parts.append(elements.block("\n".join(lines)) if lines else "")
    return "".join(parts)

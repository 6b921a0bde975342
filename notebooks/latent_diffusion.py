# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Latent diffusion, from one Gaussian to text-to-image
#
# Each cell calls the library that trains the real models. The first half needs no training: for Gaussian data the
# perfect denoiser has a closed form, so every claim can be checked. The second half trains a small model on drawings.
#
# The whole notebook needs a CPU only. `FAST=1` in the environment trains for a few steps, to test the code.

# %%
import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

REPOSITORY = "https://github.com/YOUR_NAME/ldm"  # on Colab: your fork
if importlib.util.find_spec("train_ldm") is None:
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "ldm-source"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", "ldm-source[demo]"], check=True)
    sys.path.insert(0, "ldm-source")

warnings.filterwarnings("ignore", message="IProgress not found")
import train_ldm  # first: it settles the number of threads before torch is imported

# isort: split
import matplotlib.pyplot as plt
import torch
from IPython.display import display
from PIL import Image

from ldm.data import openmoji
from ldm.data.images import grid, to_pil, to_tensor
from ldm.diffusion.likelihood import log_density
from ldm.diffusion.process import DiffusionProcess
from ldm.diffusion.schedules import SCHEDULES
from ldm.models import autoencoder
from ldm.sampling.loop import sample
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.solvers import Solver, scheduler

FAST = os.environ.get("FAST") == "1"
ROOT = Path(train_ldm.__file__).parent  # where configs/ is
WORK = Path("runs/notebook-fast" if FAST else "runs/notebook")
BLUE, ORANGE, GREY = "#1c7ed6", "#e8590c", "#868e96"
plt.rcParams |= {"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
plt.rcParams |= {"grid.alpha": 0.25, "figure.constrained_layout.use": True}

# %% [markdown]
# ## 1. One Gaussian
#
# **The forward process** mixes data with noise: $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\varepsilon$,
# with $\varepsilon \sim \mathcal N(0, 1)$ ([DDPM](https://arxiv.org/abs/2006.11239), eq. 4). Our data are
# $x_0 \sim \mathcal N(m, s^2)$. The last $x_t$ is nearly standard normal, whatever the data were.

# %%
M, S = 2.0, 0.5
process = DiffusionProcess("eps", "linear")
generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


times = torch.arange(0, 1000, 10)
x0, eps = M + S * normal(1, 4000, 1, 1), normal(1, 4000, 1, 1)
x_t = process.add_noise(x0.expand(100, -1, -1, -1), eps.expand(100, -1, -1, -1), times).squeeze()  # (time, sample)

fig, ax = plt.subplots(figsize=(7, 2.6))
for low, high in ((0.01, 0.99), (0.05, 0.95), (0.25, 0.75)):
    ax.fill_between(times, x_t.quantile(low, 1), x_t.quantile(high, 1), color=BLUE, alpha=0.2, lw=0)
ax.plot(times, x_t[:, :12], color=BLUE, lw=0.6, alpha=0.7)
ax.set(xlabel="t", ylabel="$x_t$", title="From data (left) to noise (right): 50, 90 and 98 % of the samples")
plt.show()

# %% [markdown]
# **The score** is the slope of the log-density, $\nabla \log p_t(x)$. Here $p_t$ is a Gaussian too, of mean $\alpha m$
# and variance $\alpha^2 s^2 + \sigma^2$, where $\alpha = \sqrt{\bar\alpha_t}$, $\sigma = \sqrt{1-\bar\alpha_t}$.
# The best prediction of the noise is the score in other units:
# $\mathrm E[\varepsilon \mid x_t] = -\sigma\,\nabla \log p_t(x_t)$
# ([score SDE](https://arxiv.org/abs/2011.13456), eq. 7). A network would learn it; we write it down.

# %%


def perfect_eps(x: torch.Tensor, alpha: torch.Tensor | float, sigma: torch.Tensor | float) -> torch.Tensor:
    """E[ε | x_t] for data N(M, S²)."""
    return sigma * (x - alpha * M) / (alpha**2 * S**2 + sigma**2)


line = torch.linspace(-4, 4, 200)
fig, axes = plt.subplots(1, 3, figsize=(8, 2.4), sharey=True)
for ax, t in zip(axes, (50, 250, 700), strict=True):
    alpha, sigma = (float(value) for value in process.alpha_sigma(torch.tensor([t])))
    density = torch.distributions.Normal(alpha * M, (alpha**2 * S**2 + sigma**2) ** 0.5).log_prob(line).exp()
    ax.plot(line, density, color=BLUE, label="density $p_t$")
    ax.plot(line, -perfect_eps(line, alpha, sigma) / sigma / 10, color=ORANGE, label="score / 10")
    ax.set(title=f"t = {t}", ylim=(-1, 1), xlabel="$x_t$")
axes[0].legend(fontsize=8, loc="lower left")
plt.show()

# %% [markdown]
# **The reverse process** starts from noise and follows the score. DDPM adds fresh noise in each step (eq. 11).
# [DDIM](https://arxiv.org/abs/2010.02502) (eq. 12) and DPM-Solver++, a second-order solver of the ODE, add none. All
# must return to $\mathcal N(2, 0.5^2)$.

# %%
N = 4000
results = {}
fig, axes = plt.subplots(1, 3, figsize=(8, 2.4), sharey=True)
for ax, name, steps in zip(axes, ("ddpm", "ddim", "dpm++"), (1000, 200, 100), strict=True):
    solver = Solver(scheduler(process, name), steps, torch.device("cpu"))
    x = sample(lambda x, at: perfect_eps(x, at.alpha, at.sigma), solver, normal(N, 1, 1, 1), [generator]).flatten()
    results[name] = float(x.mean()), float(x.std())
    ax.hist(x.numpy(), 50, density=True, color=BLUE, alpha=0.6)
    ax.plot(line, torch.distributions.Normal(M, S).log_prob(line).exp(), color=ORANGE)
    ax.set(title=f"{name}, {steps} steps", xlim=(0, 4))
    print(f"{name}: mean {x.mean():.3f} ± {S / N**0.5:.3f}, deviation {x.std():.3f} ± {S / (2 * N) ** 0.5:.3f}")
plt.show()

# %% [markdown]
# **Fewer steps** cost accuracy; second-order solvers lose less. The ODE maps noise to data as a straight line here,
# $x_0 = m + s\,\varepsilon$, so that one image's error tells all.

# %%
counts = [5, 10, 20, 50, 100]
probe = torch.linspace(-2, 2, 9)[:, None, None, None]
fig, ax = plt.subplots(figsize=(5.5, 2.8))
errors = {}
for name, marker in (("ddim", "o"), ("heun", "s"), ("dpm++", "^")):
    solvers = [Solver(scheduler(process, name), steps, torch.device("cpu")) for steps in counts]
    drawn = [sample(lambda x, at: perfect_eps(x, at.alpha, at.sigma), solver, probe) for solver in solvers]
    errors[name] = [float((x - M - S * probe).abs().max()) for x in drawn]
    ax.loglog(counts, errors[name], marker=marker, label=name)
ax.set(xlabel="steps", ylabel="largest error", title="Error of the sample")
ax.legend()
plt.show()

# %% [markdown]
# **Likelihood.** Run the same ODE from data to noise and add up how it stretches space: the result is $\log p(x_0)$
# ([score SDE](https://arxiv.org/abs/2011.13456), eq. 39). The small difference is the prior's: the last $x_t$ has mean
# $\alpha m$, not 0.

# %%


def model(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return perfect_eps(x_t, *process.alpha_sigma(t, x_t.dtype))


points = torch.linspace(0, 4, 41, dtype=torch.float64)
computed = log_density(process, model, points[:, None, None, None])
exact = torch.distributions.Normal(M, S).log_prob(points)
likelihood_error = float((computed - exact).abs().max())
fig, ax = plt.subplots(figsize=(5.5, 2.6))
ax.plot(points, exact, color=ORANGE, lw=4, alpha=0.5, label="closed form")
ax.plot(points, computed, ".", color=BLUE, label="along the ODE")
ax.set(xlabel="$x_0$", ylabel=r"$\log p(x_0)$", title=f"Largest difference: {likelihood_error:.3f} nats")
ax.legend()
plt.show()

# %% [markdown]
# ## 2. A mixture in two dimensions
#
# Eight Gaussians on a circle. The best noise prediction averages those of the eight, weighted by how probable each one
# is given $x_t$. Early in the reverse process it points to the centre; later each point decides for a cluster.

# %%
turn = torch.arange(8) * torch.pi / 4
CENTRES, WIDTH = 1.6 * torch.stack([turn.cos(), turn.sin()], 1), 0.12


def mixture_eps(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """E[ε | x_t] for the mixture; x `(N, 2, 1, 1)`."""
    offset = x.flatten(1)[:, None] - alpha * CENTRES  # (N, 8, 2)
    variance = alpha**2 * WIDTH**2 + sigma**2
    probability = (-offset.square().sum(-1) / (2 * variance)).softmax(1)
    return (sigma * (probability[..., None] * offset).sum(1) / variance)[..., None, None]


path = []


def denoise(x: torch.Tensor, level) -> torch.Tensor:
    path.append(x.flatten(1))
    return mixture_eps(x, level.alpha, level.sigma)


solver = Solver(scheduler(process, "ddim"), 100, torch.device("cpu"))
final = sample(denoise, solver, normal(1500, 2, 1, 1)).flatten(1)
fig, axes = plt.subplots(1, 5, figsize=(9, 2.1), sharex=True, sharey=True)
for ax, i in zip(axes, (0, 70, 82, 91, None), strict=True):
    x = final if i is None else path[i]
    ax.scatter(*x.T, s=2, color=BLUE, alpha=0.5, lw=0)
    ax.set(title="image" if i is None else f"t = {int(solver.levels[i].t)}", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
plt.show()

# %% [markdown]
# The paths of thirty points, and the field that they follow.

# %%
xy = torch.cartesian_prod(torch.linspace(-2.5, 2.5, 19), torch.linspace(-2.5, 2.5, 19))
fig, axes = plt.subplots(1, 3, figsize=(9, 3), sharex=True, sharey=True)
for ax, t in zip(axes, (400, 100), strict=False):
    alpha, sigma = (float(value) for value in process.alpha_sigma(torch.tensor([t])))
    score = -mixture_eps(xy[..., None, None], alpha, sigma).flatten(1) / sigma
    arrows = score / score.norm(dim=1, keepdim=True).clamp(min=1e-6)
    ax.quiver(*xy.T, *arrows.T, color=BLUE, scale=24, width=0.006, pivot="mid")
    ax.set(title=f"score at t = {t}", aspect="equal")
steps = torch.stack([*path, final])[:, :30]
axes[2].plot(steps[..., 0], steps[..., 1], color=GREY, lw=0.6)
axes[2].scatter(*final[:30].T, s=12, color=ORANGE, zorder=3)
axes[2].set(title="thirty paths", aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
plt.show()
nearest = torch.cdist(final, CENTRES).min(1).values
distance = float(nearest.square().mean().sqrt())
print(f"root mean square distance to the nearest centre: {distance:.3f}; of the data: {WIDTH * 2**0.5:.3f}")

# %% [markdown]
# ## 3. Schedules
#
# How fast does the signal fade? The log signal-to-noise ratio $\log \bar\alpha_t / (1-\bar\alpha_t)$ tells. Most
# chains stop short of pure noise, yet sampling starts from it: very dark and very bright images go missing. *Zero
# terminal SNR* ([arXiv 2305.08891](https://arxiv.org/abs/2305.08891), algorithm 1) rescales the chain so that
# $\bar\alpha_T = 0$.

# %%
zero_snr = DiffusionProcess("v", "scaled_linear", zero_snr=True)
last_alpha_bar = float(zero_snr.chain().alpha_bar[-1])
fig, ax = plt.subplots(figsize=(6, 3))
for name in SCHEDULES:
    chain = DiffusionProcess("v", name).chain()
    ax.plot(chain.log_snr, label=f"{name}: last {chain.alpha_bar[-1]:.0e}")
ax.plot(zero_snr.chain().log_snr, "k--", label=f"scaled_linear, zero SNR: last {last_alpha_bar:.0f}")
ax.set(xlabel="t", ylabel="log-SNR", ylim=(-13, 10), title=r"Schedules, and their last $\bar\alpha$")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# The same drawing under three schedules. The drawings are by [OpenMoji](https://openmoji.org), CC BY-SA 4.0.

# %%
SIZE = 32
drawings = openmoji.draw("openmoji-demo", SIZE, WORK / "drawings")
shapes = [(drawing, path) for drawing, path in drawings if drawing.label == "shape"]


def read(path: Path) -> torch.Tensor:
    return to_tensor(Image.open(path).convert("RGB"))


def show(ax: plt.Axes, pixels: torch.Tensor, title: str = "") -> None:
    ax.imshow(to_pil(pixels[None])[0], interpolation="nearest")
    ax.set_title(title, fontsize=9)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


drawing = read(next(path for drawing, path in shapes if drawing.captions[0] == "red heart"))
noise, levels = normal(3, SIZE, SIZE), [0, 200, 400, 600, 800, 999]
rows = {"linear": DiffusionProcess("v", "linear"), "cosine": DiffusionProcess("v", "cosine"), "zero SNR": zero_snr}
fig, axes = plt.subplots(3, 6, figsize=(7, 3.8))
for (name, row), row_axes in zip(rows.items(), axes, strict=True):
    noisy = row.add_noise(drawing.expand(6, -1, -1, -1), noise.expand(6, -1, -1, -1), torch.tensor(levels))
    for ax, x, t in zip(row_axes, noisy, levels, strict=True):
        show(ax, x, f"t = {t}" if row is rows["linear"] else "")
    row_axes[0].set_ylabel(name)
plt.show()

# %% [markdown]
# ## 4. Two stages: text to image
#
# Diffusion in pixels is costly. *Latent* diffusion ([arXiv 2112.10752](https://arxiv.org/abs/2112.10752)) first trains
# an autoencoder, then a U-Net in its latents. We train both on coloured shapes, with `configs/tiny.yaml`. Three
# combinations of colour and shape are left out: can the model draw what it has never seen?

# %%
(WORK / "shapes").mkdir(exist_ok=True)
held_out = [drawing.captions[0] for drawing, _ in shapes if drawing.split != "train"]
for drawing, path in shapes:
    if drawing.split == "train":
        shutil.copy(path, WORK / "shapes")
        (WORK / "shapes" / f"{path.stem}.txt").write_text(drawing.captions[0])
captions = [drawing.captions[0] for drawing, _ in shapes]
print("left out:", ", ".join(held_out))
display(grid([Image.open(path) for _, path in shapes], captions, 9, marked=map(captions.index, held_out)).quantize(64))

# %% [markdown]
# **Training.** The same as `python train_ldm.py --config configs/tiny.yaml …` in a terminal. The U-Net predicts the
# velocity $\varepsilon - x_0$ of a straight path from data to noise
# ([rectified flow](https://arxiv.org/abs/2209.03003), eq. 1). Run the cell again and it finds the run finished.

# %%
STAGE1, STAGE2 = (12, 4) if FAST else (300, 600)
options = [
    "data.val_fraction=0",
    f"run.log_every={2 if FAST else 100}",
    "sample.every=100000",
    f"run.dir={WORK / 'run'}",
]
for stage, steps in (("stage1", STAGE1), ("stage2", STAGE2)):
    options += [f"{stage}.steps={steps}", f"{stage}.checkpoint_every=1000"]
config = ["--config", str(ROOT / "configs/tiny.yaml"), f"data.source={WORK / 'shapes'}"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors_shown:
    status = train_ldm.main([*config, *options])
assert not status, errors_shown.getvalue()

fig, axes = plt.subplots(1, 2, figsize=(7, 2.4))
for ax, stage in zip(axes, ("stage1", "stage2"), strict=True):
    lines = [json.loads(line) for line in (WORK / "run" / stage / "metrics.jsonl").read_text().splitlines()]
    points = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    ax.plot(*zip(*points, strict=True), "o-", color=BLUE)
    ax.set(title=f"loss of {stage}", xlabel="step")
plt.show()

# %% [markdown]
# **Stage one: image → latents → image.** The latents have a quarter of the pixels, in four channels. PSNR is
# $10 \log_{10}(4 / \mathrm{MSE})$ for values in $[-1, 1]$; 30 dB look alike.

# %%
vae = autoencoder.load(WORK / "run/autoencoder")
examples = torch.stack([read(path) for _, path in shapes[:6]])
latents = vae.encode(examples)
rebuilt = vae.decode(latents)
psnr = float(10 * torch.log10(4 / (rebuilt - examples).square().mean()))
print(f"{tuple(examples.shape[1:])} → {tuple(latents.shape[1:])}; PSNR {psnr:.1f} dB")
fig, axes = plt.subplots(3, 6, figsize=(7, 3.8))
for column, image, latent, again in zip(axes.T, examples, latents, rebuilt, strict=True):
    show(column[0], image)
    show(column[1], latent[:3] / 3)
    show(column[2], again)
for ax, name in zip(axes[:, 0], ("image", "latents 1-3", "decoded"), strict=True):
    ax.set_ylabel(name, fontsize=9)
plt.show()

# %% [markdown]
# **Stage two: text to image.** The result is a diffusers pipeline. Framed: combinations that were left out.

# %%
model = LatentDiffusion.load(WORK / "run/pipeline", "cpu")
prompts = ["red heart", "blue heart", "yellow circle", "brown square", "purple square", *held_out]
images = model(prompts, seed=0, num_inference_steps=2 if FAST else 20)
display(grid(images, prompts, len(prompts), marked=map(prompts.index, held_out)).quantize(64))

# %% [markdown]
# **The reverse process in latents**, decoded: what the network predicts as the final image, from pure noise to the end.

# %%
predicted = []
model("red heart", seed=1, num_inference_steps=6, callback=lambda step: predicted.append(step.x0))
fig, axes = plt.subplots(1, len(predicted), figsize=(7, 1.5))
for i, (ax, x) in enumerate(zip(axes, vae.decode(torch.cat(predicted)), strict=True)):
    show(ax, x, f"step {i + 1}")
plt.show()

# %% [markdown]
# **Classifier-free guidance** ([arXiv 2207.12598](https://arxiv.org/abs/2207.12598)) moves the prediction away from
# that of an empty prompt: $\hat\varepsilon = \varepsilon_\varnothing + w\,(\varepsilon_c - \varepsilon_\varnothing)$.
# At $w = 0$ the text is ignored; at 1 it is followed; more follows it more strictly, at the cost of
# variety.

# %%
scales = [0.0, 1.0, 3.0, 8.0]
steps = 2 if FAST else 20
sheets = [model("blue circle", count=6, seed=0, guidance_scale=w, num_inference_steps=steps) for w in scales]
fig, axes = plt.subplots(len(scales), 6, figsize=(6, 4.3))
for row, w, sheet in zip(axes, scales, sheets, strict=True):
    for ax, image in zip(row, sheet, strict=True):
        show(ax, to_tensor(image))
    row[0].set_ylabel(f"w = {w:g}", fontsize=9)
plt.show()

# %% [markdown]
# ## Go on
#
# This model has seen few drawings for a minute or two. `make demo` trains on 805 at twice the size in 15 to 40 minutes.
# Your own images: `docs/quickstart.md`. Every solver and option: `docs/guides/sampling.md`.

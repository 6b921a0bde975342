"""The page *Learn*."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from ldm.app import forward, inputs, learn_parts, reverse, roots
from ldm.app.drawing import Settings
from ldm.diffusion.schedules import LOG_SNR, LearnedSchedule
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.checkpoint import write_checkpoint
from ldm.utils.errors import UserError

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest

from ldm.app.generate import load

pytestmark = pytest.mark.usefixtures("rooted")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., LatentDiffusion]) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "runs/a/pipeline"
    random_model("text").save(folder)
    return folder


def script() -> None:
    from ldm.app.learn import page

    page()


def opened(view: str) -> AppTest:
    app = AppTest.from_function(script, default_timeout=120)
    app.query_params["view"] = view
    app.run()
    assert not app.exception
    return app


def test_the_page_shows_the_library_s_numbers_at_the_slider_s_time() -> None:
    app = opened("Forward")
    app.selectbox[0].set_value("flow")
    app.slider[0].set_value(0.25).run()
    assert [metric.value for metric in app.metric] == ["0.750", "0.250", f"{2 * np.log(3):.3f}"]
    assert any("2209.03003" in caption.value for caption in app.caption)


def test_a_change_of_view_leaves_the_address_alone() -> None:
    app = AppTest.from_function(script, default_timeout=120).run()
    app.segmented_control(key="learn-view").set_value("Schedules").run()
    assert app.title[0].value == "Noise schedules side by side" and not app.query_params


def test_a_bad_upload_is_a_sentence() -> None:
    for data, message in ((b"not an image", "image: it is none of"), (_bomb(), "image: 8000 × 8000 pixels")):
        with pytest.raises(UserError, match=message):
            inputs.decoded(data)
    app = opened("Forward")
    app.file_uploader[0].upload("a.png", b"not an image", "image/png").run()
    assert len(app.error) == 1 and "none of" in app.error[0].value and not app.exception


def _bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (8000, 8000)).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_schedule_goes_from_the_image_to_noise() -> None:
    image = inputs.sample()[0].resize((32, 32))
    alpha_bar, _ = forward.curves(forward.PROCESSES)
    assert (alpha_bar.diff().iloc[1:] < 1e-12).all().all()
    assert (alpha_bar.iloc[0] > 0.998).all() and (alpha_bar.iloc[-1] < 5e-3).all()
    for name, process in forward.PROCESSES.items():
        first = torch.from_numpy(np.array(forward.noised(image, process, [0.0])[0])).float()
        assert (first - torch.from_numpy(np.array(image)).float()).abs().mean() < 4
        assert forward.FORMULAS[name][1]


def test_a_learned_schedule_is_one_of_those_side_by_side(folder: Path) -> None:
    run, schedule = folder.parent, LearnedSchedule()
    torch.nn.init.constant_(schedule.outer, 0.05)  # no longer a line
    weights = {f"schedule.{name}": value for name, value in schedule.state_dict().items()}
    write_checkpoint(run / "stage2/checkpoints/step-000001", {"model": weights}, {})
    (run / "config.yaml").write_text("configuration:\n  stage2:\n    beta_schedule: learned\n")
    process = forward.learned(run)
    t = torch.tensor([0, 499, 999])
    expected = schedule((t + 1) / 1000).detach()
    assert torch.allclose(process.log_snr(t), expected, atol=1e-4) and abs(float(expected[1]) - sum(LOG_SNR) / 2) > 0.1
    app = opened("Schedules")
    assert not app.error and "**learned**" in [text.value for text in app.markdown]


def test_predictions_and_films_are_the_library_s(folder: Path) -> None:
    loaded = load(str(folder))
    model, settings = loaded.model, Settings(str(folder), "cat", seed=3, options=Sampling(guidance_scale=2.0))
    found = reverse.looks(loaded, settings, Image.radial_gradient("L").convert("RGB"))
    noise = [look.level.noise for look in found.at]
    assert len(noise) == reverse.LEVELS and noise == sorted(noise)
    worst = max(found.at, key=lambda look: look.level.noise)
    assert worst.x0_error > 0 and worst.eps_error < 1e-3  # pure noise: v says ε whatever the network predicts

    shares: list[float] = []
    options = Sampling(solver="ddim", num_inference_steps=4, guidance_scale=2.0)
    film = reverse.film(loaded, Settings(str(folder), "cat", seed=3, options=options), shares.append)
    (image,) = model("cat", 3, solver="ddim", num_inference_steps=4, guidance_scale=2.0)
    assert len(film.x_t) == len(film.x0) == 5 and shares == [0.25, 0.5, 0.75, 1.0]
    assert ImageChops.difference(film.x_t[-1], image).getbbox() is None
    assert ImageChops.difference(film.x0[-2], image).getbbox() is None  # ddim ends at its last prediction
    assert [film.frame(share) for share in (0.0, 0.5, 1.0)] == [0, 2, 4]


def test_every_view_draws_with_a_small_model() -> None:
    app = opened("Reverse")
    assert not app.error and not app.info
    names = [text.value.partition(",")[0] for text in app.markdown]
    assert [name for name in names if name.startswith("**")] == [f"**{name}**" for name, *_ in reverse.SOLVERS.values()]
    app.text_input[-1].set_value(" ")
    app.button[0].click().run()
    assert "empty prompt" in app.error[0].value and not app.exception
    for view, sources in {"Network": "2202.00512", "Steps": "2211.01095", "Guidance": "2207.12598"}.items():
        app = opened(view)
        assert not app.error and not app.info, view
        assert any(sources in caption.value for caption in app.caption)


def test_without_a_model_or_before_the_button_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(learn_parts, "SMALL", 0)
    assert "press the button" in opened("Steps").info[0].value
    monkeypatch.setenv(roots.ROOTS, str(tmp_path / "none"))
    assert "*Train*" in opened("Reverse").info[0].value

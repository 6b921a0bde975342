"""The page *Learn*."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.app import forward, inputs
from ldm.utils.errors import UserError

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest


def script() -> None:
    from ldm.app.learn import page

    page()


def test_the_page_shows_the_library_s_numbers_at_the_slider_s_time() -> None:
    app = AppTest.from_function(script, default_timeout=60).run()
    assert not app.exception
    app.selectbox[0].set_value("flow")
    app.slider[0].set_value(0.25).run()
    assert [metric.value for metric in app.metric] == ["0.750", "0.250", f"{2 * np.log(3):.3f}"]
    assert any("2209.03003" in caption.value for caption in app.caption)


def test_a_bad_upload_is_a_sentence() -> None:
    for data, message in ((b"not an image", "image: it is none of"), (_bomb(), "image: 8000 × 8000 pixels")):
        with pytest.raises(UserError, match=message):
            inputs.decoded(data)
    app = AppTest.from_function(script, default_timeout=60).run()
    app.file_uploader[0].upload("a.png", b"not an image", "image/png").run()
    assert len(app.error) == 1 and "none of" in app.error[0].value and not app.exception


def _bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (8000, 8000)).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_schedule_goes_from_the_image_to_noise() -> None:
    image = inputs.sample()[0].resize((32, 32))
    alpha_bar, _ = forward.curves()
    assert (alpha_bar.diff().iloc[1:] < 1e-12).all().all()
    assert (alpha_bar.iloc[0] > 0.998).all() and (alpha_bar.iloc[-1] < 5e-3).all()
    for name in forward.PROCESSES:
        first = torch.from_numpy(np.array(forward.noised(image, name, [0.0])[0])).float()
        assert (first - torch.from_numpy(np.array(image)).float()).abs().mean() < 4
        assert forward.FORMULAS[name][1]

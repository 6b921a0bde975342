"""The page *Learn*: what noise does to an image, schedule by schedule."""

from __future__ import annotations

import streamlit as st
from PIL import Image

from ldm.app.forward import FORMULAS, PROCESSES, coefficients, curves, noised
from ldm.app.inputs import IMAGE_TYPES, decoded, plain, sample, sentences
from ldm.data.crops import crop_resize

SIDE = 192  # pixels of the pictures
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#333333"]  # one a schedule, told apart by all eyes
STRIP = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def page() -> None:
    """Draws the page."""
    st.title("How an image becomes noise")
    image = _image()
    _forward(image)
    _schedules(image)


def _image() -> Image.Image:
    """The visitor's image, or a sample."""
    with st.sidebar:
        upload = st.file_uploader("Your image", IMAGE_TYPES, help="At most 20 MB. Without one, a drawing is used.")
        if not upload:
            image, source = sample()
            st.caption(plain(source))
            return crop_resize(image, (SIDE, SIDE))[0]
        with sentences():
            return crop_resize(decoded(upload.getvalue()), (SIDE, SIDE))[0]
    raise AssertionError("a mistake ends the page")


def _forward(image: Image.Image) -> None:
    st.markdown(
        "Training shows the network images with noise of every strength. Move the slider: $t$ goes from image to noise."
    )
    left, right = st.columns(2)
    name = left.selectbox("Noise schedule", list(PROCESSES), index=2)
    share = right.slider("t / T", 0.0, 1.0, 0.4, 0.01)
    alpha, sigma, log_snr = coefficients(name, share)
    clean, noisy, formula = st.columns([1, 1, 2])
    clean.image(image, "x₀, the image", width="stretch")
    noisy.image(noised(image, name, [share])[0], f"x_t at t/T = {share:.2f}", width="stretch")
    with formula:
        st.latex(r"x_t = \alpha(t)\,x_0 + \sigma(t)\,\varepsilon,\qquad \varepsilon \sim \mathcal{N}(0, 1)")
        st.caption("DDPM, arXiv 2006.11239, eq. 4")
        text, source = FORMULAS[name]
        st.latex(text)
        st.caption(source)
        for column, label, value in zip(st.columns(3), ("α", "σ", "log-SNR"), (alpha, sigma, log_snr), strict=True):
            column.metric(label, f"{value:.3f}")


def _schedules(image: Image.Image) -> None:
    st.header("Schedules side by side")
    alpha_bar, log_snr = curves()
    left, right = st.columns(2)
    left.markdown("**Signal left**, $\\bar\\alpha = \\alpha^2 / (\\alpha^2 + \\sigma^2)$")
    left.line_chart(alpha_bar, x_label="t / T", color=[*COLOURS], height=260)
    right.markdown("**Log-SNR**, $\\log(\\alpha^2 / \\sigma^2)$, within ±20")
    right.line_chart(log_snr, x_label="t / T", color=[*COLOURS], height=260)
    st.markdown("The same image and noise at equal $t$:")
    for name in PROCESSES:
        label, *columns = st.columns([1.4, *[1] * len(STRIP)], vertical_alignment="center")
        label.markdown(f"**{name}**")
        label.caption(FORMULAS[name][1])
        for column, picture, share in zip(columns, noised(image, name, STRIP), STRIP, strict=True):
            column.image(picture, f"{share:.1f}", width="stretch")

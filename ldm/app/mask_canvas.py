"""A sheet over an image on which a visitor paints the mask for inpainting."""

from __future__ import annotations

import base64
import binascii
import io

import streamlit as st
from PIL import Image

from ldm.app.inputs import decoded
from ldm.app.launch import MAX_UPLOAD_MB
from ldm.utils.errors import UserError

SHEET_SIDE = 640  # pixels: the longer side of the sheet, whatever the image's
MAX_HEIGHT = 420  # pixels of the screen, so that a high image leaves room for the form
PREFIX = "data:image/png;base64,"

HTML = """
<div class="tools">
  <label>Brush <input type="range" min="1" max="30" value="8" aria-label="Brush size"></label>
  <button type="button">Clear</button>
</div>
<div class="sheet"><img alt="" draggable="false"><canvas aria-label="Paint what to generate"></canvas></div>
"""
CSS = """
.tools { display: flex; gap: 1rem; align-items: center; justify-content: space-between; margin-bottom: .5rem;
         font: .875rem var(--st-font); color: var(--st-text-color); }
.tools label { display: flex; gap: .5rem; align-items: center; }
.tools input { accent-color: var(--st-primary-color); }
.tools button { font: inherit; color: inherit; background: none; cursor: pointer; padding: .25rem .75rem;
                border: 1px solid var(--st-border-color, #8886); border-radius: .5rem; }
.sheet { position: relative; line-height: 0; }
.sheet img { width: 100%; border-radius: .5rem; }
.sheet canvas { position: absolute; inset: 0; width: 100%; height: 100%; opacity: .7; cursor: crosshair;
                touch-action: none; border-radius: .5rem; }
"""
JS = """
export default function ({ parentElement, data, setStateValue }) {
  const [image, canvas, brush, clear] = ["img", "canvas", "input", "button"].map((name) =>
    parentElement.querySelector(name));
  const pen = canvas.getContext("2d");
  if (!canvas.dataset.ready) {  // it is called again after each change, and keeps what was painted
    canvas.dataset.ready = "yes";
    [canvas.width, canvas.height] = data.size;
    image.style.aspectRatio = data.size.join(" / ");
    parentElement.querySelector(".sheet").style.maxWidth = `${(data.height * data.size[0]) / data.size[1]}px`;
    image.src = data.image;
  }
  let last = null;
  const paint = (event) => {
    const box = canvas.getBoundingClientRect();
    const scale = canvas.width / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    pen.strokeStyle = "white";
    pen.lineCap = "round";
    pen.lineWidth = (brush.value / 100) * canvas.width;
    pen.beginPath();
    pen.moveTo(...(last ?? [x, y]));
    pen.lineTo(x, y);
    pen.stroke();
    last = [x, y];
  };
  const end = () => {
    if (!last) return;
    last = null;
    setStateValue("mask", canvas.toDataURL());
  };
  canvas.onpointerdown = (event) => { canvas.setPointerCapture(event.pointerId); paint(event); };
  canvas.onpointermove = (event) => { if (last) paint(event); };
  canvas.onpointerup = canvas.onpointercancel = end;
  clear.onclick = () => {
    pen.clearRect(0, 0, canvas.width, canvas.height);
    setStateValue("mask", null);
  };
}
"""
_canvas = st.components.v2.component("ldm_mask_canvas", html=HTML, css=CSS, js=JS)


def painted_mask(image: Image.Image, key: str) -> bytes | None:
    """A PNG of the image's size, white where the visitor painted; None before that. `key` names the image."""
    sheet = image.copy()
    sheet.thumbnail((SHEET_SIDE, SHEET_SIDE))
    sheet.save(buffer := io.BytesIO(), "JPEG", quality=85)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    state = _canvas(
        key=f"mask-{key}",
        data={"image": url, "size": sheet.size, "height": MAX_HEIGHT},
        default={"mask": None},
        on_mask_change=lambda: None,
    )
    return mask_png(state.mask, image.size) if state.mask else None


def mask_png(url: str, size: tuple[int, int]) -> bytes:
    """The PNG of a mask of `size` from the sheet's data URL; UserError where that is too large, or no image."""
    data = str(url).removeprefix(PREFIX)
    if len(data) > MAX_UPLOAD_MB * 2**20 * 4 / 3:
        raise UserError(f"mask: more than {MAX_UPLOAD_MB} MB; clear it and paint anew")
    try:
        mask = decoded(base64.b64decode(data, validate=True), "mask", "black")
    except binascii.Error:
        raise UserError("mask: what the browser sent is no image; clear it and paint anew") from None
    painted = mask.convert("L").point(lambda value: 255 * (value >= 128)).resize(size, Image.Resampling.NEAREST)
    painted.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()

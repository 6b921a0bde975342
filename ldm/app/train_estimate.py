"""Time, memory and disk of a training of the page *Train*, by the library's dry run."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from tempfile import TemporaryDirectory

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from ldm.app.inputs import plain

BAR = re.compile(r"%\||/s\]$")  # a progress bar
TOTAL = "in all: "  # begins the dry run's line on all stages


def estimate(arguments: Sequence[str], start: bool, place: DeltaGenerator) -> None:
    """What the library's dry run with these arguments says, for as long as they stay; with `start`, it runs now.

    The result goes into `place`, all that was printed below.
    """
    if start:
        with place, st.spinner("Measuring two steps of each stage, about 20 seconds …", show_time=True):
            st.session_state["train-estimate"] = (list(arguments), _dry_run(arguments))
    of, printed = st.session_state.get("train-estimate", ([], []))
    if of != list(arguments):
        return
    if errors := [line.removeprefix("error: ") for line in printed if line.startswith("error: ")]:
        place.error(f"It could not be measured: {plain(errors[-1])}")
        return
    for problem in (line for line in printed if line.startswith("training would stop: ")):
        st.warning(plain(problem))
    totals = [line.removeprefix(TOTAL) for line in printed if line.startswith(TOTAL)]
    place.markdown(f"About {plain(totals[-1])}." if totals else "It was not measured; why is below.")
    with st.expander("All that was measured"):
        st.code("\n".join(printed), None, wrap_lines=True)


def _dry_run(arguments: Sequence[str]) -> list[str]:
    """The lines that a dry run prints, the last one shown as it comes; it ends with this call, and leaves nothing."""
    printed, shown = list[str](), st.empty()
    with (
        TemporaryDirectory(prefix="ldm-estimate-", ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TMPDIR": folder},  # what it makes there, a killed one leaves
        ) as process,
    ):
        assert process.stdout
        try:
            for line in map(str.rstrip, process.stdout):
                if line and not BAR.search(line):
                    printed.append(line)
                    shown.caption(plain(line))
        except BaseException:  # the visitor left
            process.kill()
            raise
    shown.empty()
    return printed

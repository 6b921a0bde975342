"""What is reported of data that come late."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from ldm.training.loading import report_slow


def batches(*seconds: float) -> Iterator[float]:
    for wait in seconds:
        time.sleep(wait)
        yield wait


def test_late_data_is_reported_while_the_step_waits_and_when_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    during = []

    def watched() -> Iterator[float]:
        for wait in batches(0, 0.4, 0, 0.3):
            during.append(capsys.readouterr().err)
            yield wait

    assert list(report_slow(watched(), "stage2", seconds=0.1)) == [0, 0.4, 0, 0.3]
    late = r"stage2: process 0, on \S+, has waited 0 s( .*)?\. See that .* responds\.\n"
    assert [bool(re.fullmatch(late, text)) for text in during] == [False, True, False, True]
    assert re.fullmatch(r"stage2: process 0, on \S+, has data again, after 0 s\.\n", during[2])


def test_nothing_is_said_of_data_that_is_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(report_slow(batches(0, 0.01, 0), "stage2", seconds=5)) == [0, 0.01, 0]
    assert capsys.readouterr().err == ""

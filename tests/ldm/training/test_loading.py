"""What is reported of data that come late."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from ldm.training.loading import report_slow


def test_late_data_is_reported_while_the_step_waits_and_when_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    during = []

    def watched() -> Iterator[int]:
        for n, is_late in enumerate((False, True, False, True)):
            text, end = capsys.readouterr().err, time.monotonic() + 30
            while is_late and not text and time.monotonic() < end:
                time.sleep(0.01)
                text = capsys.readouterr().err
            during.append(text)
            yield n

    assert list(report_slow(watched(), "stage2", seconds=0.5)) == [0, 1, 2, 3]
    late = r"stage2: process 0, on \S+, has waited \d+ s( .*)?\. See that .* responds\.\n"
    assert [bool(re.fullmatch(late, text)) for text in during] == [False, True, False, True]
    assert re.fullmatch(r"stage2: process 0, on \S+, has data again, after \d+ s\.\n", during[2])


def test_nothing_is_said_of_data_that_is_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(report_slow(iter([0, 1, 2]), "stage2", seconds=5)) == [0, 1, 2]
    assert capsys.readouterr().err == ""

"""What a stage of a run needs, in words: time, memory and disk."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.config.schema import Config, Training


@dataclass(frozen=True)
class ResourceEstimate:
    """What a stage needs, in seconds and bytes; memory is that of one process, on its GPU where it has one."""

    step: float
    validation: float
    sheet: float
    encoding: float
    memory: int
    disk: int
    device: str
    evaluation: float = 0.0
    """Of `stage2.evaluate`, once the features of the real images are computed."""

    def seconds_left(self, config: Config, stage: str, done: int = 0) -> float:
        """After `done` steps, with all that happens between them."""
        t = getattr(config, stage)
        return (
            (0.0 if done else self.encoding)
            + (t.steps - done) * self.step
            + _times(t.evaluate_every, t, done) * self.validation
            + _times(config.sample.every, t, done) * self.sheet
            + (_times(t.evaluate.every, t, done) * self.evaluation if self.evaluation else 0)
        )

    def describe(self, config: Config, stage: str, done: int = 0) -> str:
        """In a line, with the time that is left after `done` steps, and the whole stage's disk."""
        t = getattr(config, stage)
        left, validations, sheets = (
            t.steps - done,
            _times(t.evaluate_every, t, done),
            _times(config.sample.every, t, done),
        )
        encoding = 0.0 if done else self.encoding
        evaluations = _times(t.evaluate.every, t, done) if self.evaluation else 0
        return (
            f"measured {stage}: {t.batch / self.step:,.3g} images/s in global batches of {t.batch}, "
            f"{format_bytes(self.memory)} of memory on {self.device}; "
            + (f"encoding takes {format_time(encoding)}, " if encoding else "")
            + f"{left} steps take {format_time(left * self.step)}, "
            + f"{validations} × validation {format_time(validations * self.validation)}"
            + (f", {sheets} × samples {format_time(sheets * self.sheet)}" if self.sheet else "")
            + (f", {evaluations} × figures {format_time(evaluations * self.evaluation)}" if evaluations else "")
            + f": {format_time(self.seconds_left(config, stage, done))} in all, and {format_bytes(self.disk)} of disk"
        )


def _times(every: int, training: Training, done: int) -> int:
    """How often something due `every` so many steps, and after the last one, is still due."""
    return (training.steps - 1) // every - done // every + 1


def format_time(seconds: float) -> str:
    if seconds < 99:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 6000 else f"{minutes / 1440:.0f} days"


def format_bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"

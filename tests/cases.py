"""Hundreds of quick cases in one test: each test of its own costs pytest more time than the case itself."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def for_each(
    names: str | tuple[str, ...], cases: Iterable[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Like `pytest.mark.parametrize`, but all cases are one test, which ends at the first that fails and names it.

    For tests that change nothing: fixtures are those of the one test.
    """
    parameters, values = (names,) if isinstance(names, str) else names, list(cases)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: Any, **fixtures: Any) -> None:
            for value in values:
                case = dict(zip(parameters, value if len(parameters) > 1 else (value,), strict=True))
                try:
                    test(*args, **fixtures, **case)
                except Exception as error:
                    error.add_note(f"case: {case}")
                    raise

        signature = inspect.signature(test)
        others = [parameter for name, parameter in signature.parameters.items() if name not in parameters]
        assert len(signature.parameters) - len(others) == len(parameters), f"{test} does not take {names}"
        run.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return run

    return decorate

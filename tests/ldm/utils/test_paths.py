"""Paths of arguments expand, and one that can't be is named."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from ldm.utils.errors import Parser, UserError
from ldm.utils.paths import path_or_id


@pytest.fixture
def parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parser:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.delenv("UNSET", raising=False)
    parser = Parser()
    parser.add_argument("--out", type=Path, default=Path("images"))
    parser.add_argument("--model", type=path_or_id)
    return parser


def test_a_tilde_and_variables_expand_in_every_path_argument(parser: Parser, tmp_path: Path) -> None:
    args = parser.parse_args(["--out=~/a.png", "--model=~/runs/$DATA"])
    assert args.out == tmp_path / "a.png"
    assert args.model == f"{tmp_path}/runs//data"
    assert parser.parse_args(["--out=$DATA/x"]).out == Path("/data/x")
    assert parser.parse_args([]).out == Path("images")


def test_an_id_of_the_hub_stays_as_it_is(parser: Parser) -> None:
    assert parser.parse_args(["--model", "stabilityai/sd-turbo"]).model == "stabilityai/sd-turbo"


@pytest.mark.parametrize("flag", ["--out", "--model"])
def test_an_unset_variable_is_named_with_its_argument(parser: Parser, flag: str) -> None:
    with pytest.raises(UserError, match=rf"argument {flag}: '\$UNSET/a': the environment variable UNSET is not set"):
        parser.parse_args([f"{flag}=$UNSET/a"])


def test_the_model_to_benchmark_is_a_path_that_expands(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(root / "scripts")  # as for `python scripts/benchmark.py`
    monkeypatch.setenv("HOME", str(tmp_path))
    benchmark = importlib.import_module("benchmark")
    assert benchmark._parse(["sample", "--model", "~/run/pipeline"]).model == f"{tmp_path}/run/pipeline"

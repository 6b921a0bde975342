"""Keys of many files, sorted once and searched by bisection."""

from pathlib import Path

import numpy as np
import pytest

from ldm.data import key_lookup
from ldm.data.column_store import ColumnStore
from ldm.data.key_lookup import KeyLookup, first_occurrences, sort_keys


def random_keys(count: int, width: int = 32) -> np.ndarray:
    """Keys of which every tenth is a copy of another, and some end with zeros."""
    content = np.random.default_rng(0).integers(0, 256, (count, width), np.uint8)
    content[1::10] = content[::10][: len(content[1::10])]
    content[5::20, -3:] = 0
    return content.view(f"S{width}").ravel()


@pytest.mark.parametrize("part", [1, 50, 10**6])
def test_keys_are_sorted_stably_in_parts(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_lookup, "PART", part)
    for keys in (random_keys(1000), random_keys(1000, 16), random_keys(1), random_keys(0), np.array([b"a" * 32] * 9)):
        parts = list(sort_keys(keys))
        assert np.array_equal(np.concatenate([np.zeros(0, int), *parts]), np.argsort(keys, kind="stable"))
        assert len(keys) < 1000 or (len(parts) == 1) == (part > len(keys))


def test_first_occurrences_are_those_of_a_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_lookup, "PART", 50)
    for keys in (random_keys(1000), random_keys(0), np.array([b"a" * 32] * 9)):
        expected = {key: i for i, key in reversed(list(enumerate(keys.tolist())))}
        assert first_occurrences(keys).tolist() == sorted(expected.values())


def test_each_key_is_where_its_file_has_it(tmp_path: Path) -> None:
    keys = np.unique(random_keys(1000))
    keys = keys[np.random.default_rng(1).permutation(len(keys))]
    parts = dict(zip(map(Path, "abcd"), np.split(keys, [100, 100, 700]), strict=True))  # one is empty
    for columns in (ColumnStore(tmp_path / "lookup"), ColumnStore()):
        lookup = KeyLookup(columns, (), list(parts), parts.__getitem__)
        for number, part in enumerate(parts.values()):
            places = [lookup.place(key.tobytes().ljust(32, b"\0")) for key in part]
            assert places == [(number, row) for row in range(len(part))]
        assert np.array_equal(lookup.keys, np.sort(keys))
        with pytest.raises(KeyError):
            lookup.place(b"x" * 32)
    again = KeyLookup(ColumnStore(tmp_path / "lookup"), (), list(parts), lambda _: pytest.fail("a file was read"))
    assert again.place(keys[0]) == (0, 0)
    assert isinstance(again.keys.base, np.memmap)


def test_a_lookup_of_no_files_has_no_key() -> None:
    lookup = KeyLookup(ColumnStore(), (), [], lambda _: np.zeros(0, "S32"))
    assert not lookup.find([b"x" * 32])[1].any()

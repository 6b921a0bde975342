"""Free main memory is that of the machine, or what a container's or job's limit leaves."""

from pathlib import Path

import psutil
import pytest

from ldm.utils import host_memory


def test_without_a_limit_it_is_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "PROCESS", tmp_path / "cgroup")
    assert host_memory.available_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_the_limit_of_an_enclosing_group_counts_and_cached_files_are_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    for folder, limit in (("job", "5000"), ("job/step", "max")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
        (tmp_path / folder / "memory.current").write_text("4000\n")
        (tmp_path / folder / "memory.stat").write_text("anon 3000\nactive_file 300\ninactive_file 700\n")
    monkeypatch.setattr(host_memory, "PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    assert host_memory.available_memory() == 5000 - 4000 + 1000

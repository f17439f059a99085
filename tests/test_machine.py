"""What memory there is to run on."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from hybrid_rl.machine import host_memory

MIB = 2**20
V2 = {
    "own": "0::/pod/run\n",
    "at": "pod/run",
    "files": ("memory.max", "memory.current"),
    "stat": "inactive_file",
    "unlimited": "max",
}
V1 = {
    "own": "5:cpu:/\n4:memory,hugetlb:/pod/run\n",
    "at": "memory/pod/run",
    "files": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    "stat": "total_inactive_file",
    "unlimited": str(2**63 - 4096),
}


@pytest.mark.parametrize("version", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("around", [False, True], ids=["own", "around it"])
def test_a_container_may_have_less_than_the_machine(tmp_path: Path, version: dict, around: bool):
    own, mounted = tmp_path / "own", tmp_path / "mounted"
    own.write_text(version["own"])
    group = mounted / version["at"]
    group.mkdir(parents=True)
    limited = group.parent if around else group
    for name, size in zip(version["files"], (512 * MIB, 200 * MIB), strict=True):
        (limited / name).write_text(f"{size}\n")
    (limited / "memory.stat").write_text(f"anon 1\n{version['stat']} {100 * MIB}\n")
    memory = host_memory(mounted, own)
    assert (memory.total, memory.available) == (512 * MIB, 412 * MIB)
    (limited / version["files"][0]).write_text(version["unlimited"])
    assert host_memory(mounted, own).total == psutil.virtual_memory().total


def test_groups_that_cannot_be_seen_set_no_limit(tmp_path: Path):
    (own := tmp_path / "own").write_text("0::/../elsewhere\n3:memory:/docker/1234\n")
    assert host_memory(tmp_path, own).total == host_memory(tmp_path, tmp_path / "none").total

"""The one reader of memory: what is free and what there is, control groups included; peaks of processes."""

import ast
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import quern
from quern.core.machine import memory


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_control_group_counts(version, tmp_path, monkeypatch):
    whole = psutil.virtual_memory().available
    groups, mount = tmp_path / "cgroup", tmp_path / "mount"
    limit, used = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    root = mount / "memory" if version == 1 else mount
    inner = root / "outer" / "inner"
    inner.mkdir(parents=True)
    groups.write_text("4:cpu,memory:/outer/inner\n0::/\n" if version == 1 else "0::/outer/inner\n")

    def free():
        return memory.free_memory(groups, mount)

    def total():
        return memory.total_memory(groups, mount)

    machine = psutil.virtual_memory().total
    assert abs(free() - whole) < whole // 4
    assert total() == machine
    (inner / limit).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    (inner / used).write_text("3000\n")
    assert abs(free() - whole) < whole // 4
    assert total() == machine
    (inner.parent / limit).write_text("10000\n")
    assert total() == 10000
    (inner.parent / used).write_text("4000\n")
    assert free() == 6000
    prefix = "total_" if version == 1 else ""  # what the kernel drops when memory is asked for
    (inner.parent / "memory.stat").write_text(f"anon 7\n{prefix}inactive_file 500\n{prefix}active_file 300\n")
    assert free() == 6800
    (inner / limit).write_text("2000\n")
    assert free() == 0
    assert total() == 2000
    (inner / limit).write_text("nonsense\n")
    assert free() == 6800


def test_without_control_groups_it_is_the_machine(tmp_path):
    assert memory.total_memory(tmp_path / "none", tmp_path) == psutil.virtual_memory().total
    assert 0 < memory.free_memory(tmp_path / "none", tmp_path) <= psutil.virtual_memory().total


HOLD = "x = bytearray({0}); x[::4096] = b'1' * len(x[::4096]); del x; print(flush=True); input()"


def test_a_peak_stays_after_memory_is_given_back():
    size = 64 << 20
    command = [sys.executable, "-c", HOLD.format(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert size < memory.peak_rss(process.pid) < 2 * size
        process.stdin.close()
    assert memory.peak_rss(process.pid) == 0, "it is gone"


def test_the_peak_of_this_process_can_be_forgotten():
    before = memory.peak_rss()
    held = bytearray(before)
    held[::4096] = b"1" * len(held[::4096])
    assert memory.peak_rss() >= before + len(held) // 2
    size = len(held)
    del held
    memory.forget_peak()
    if memory.peak_rss() >= before + size // 2:
        pytest.skip("this kernel forgets no peak")
    assert memory.peak_rss() >= psutil.Process().memory_info().rss - (16 << 20)


def test_nobody_else_asks_the_system():
    """Free memory and peaks have one reader, which knows about containers."""
    found = []
    for path in Path(quern.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            asked = (
                node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else ""
            )
            if isinstance(asked, str) and any(
                word in asked for word in ("virtual_memory", "getrusage", "memory.max", "VmHWM")
            ):
                found.append(path.name)
    assert set(found) == {"memory.py"}

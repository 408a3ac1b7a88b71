"""docs/run.md: its example in C compiles and writes what the program writes; its help is the program's."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from quern.pipeline.export import export

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/run.md").read_text("utf-8")


def test_the_page_shows_the_programs_help(program):
    assert f"```\n{program.run('--help').out.decode()}```" in PAGE


def test_the_example_compiles_and_continues_a_text(program, tiny_model, tmp_path):
    (source,) = re.findall(r"```c\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "example.c").write_text(source)
    sanitized = "-fsanitize=address,undefined"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", sanitized, f"-I{ROOT / 'csrc/include'}"]
    subprocess.run([shutil.which("gcc") or "cc", *flags, "-c", "example.c"], cwd=tmp_path, check=True)
    libraries = [program.folder / "libquern.a", program.folder / "libquern_core.a"]
    subprocess.run(["g++", "example.o", *libraries, sanitized, "-pthread", "-o", "example"], cwd=tmp_path, check=True)
    file = export(tiny_model, tmp_path / "model.run", format="run").path
    ended = subprocess.run([tmp_path / "example", file, "import"], capture_output=True, check=True, timeout=60)
    alone = program.run(file, "-p", "import", "-n", 20)
    # Bytes that are no character of their own are written by the example one at a time.
    if "\ufffd" not in ended.stdout.decode():
        assert ended.stdout == alone.out
    assert ended.stdout.decode()[:1] == alone.out.decode()[:1]


def test_damage_is_said_in_words(program, tmp_path):
    (tmp_path / "none.run").write_bytes(b"QUERNRUN" + bytes(100))
    assert "version 0" in program.run(tmp_path / "none.run").err

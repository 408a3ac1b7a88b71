"""tools/check_symbols.py: it finds a leak, and the built objects have none."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

GOOD = "namespace { int hidden(int x) { return x + 1; } }\nextern int (*const table)(int);\nint (*const table)(int) = hidden;\n"
LEAKS = {
    "inline": "inline int shared(int x) { return x * 3; }\nint (*const pointer)(int) = shared;\n",
    "template": "template <typename T> T twice(T x) { return x + x; }\ntemplate int twice<int>(int);\n",
    "function": "int visible() { return 1; }\n",
}


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("check_symbols", ROOT / "tools/check_symbols.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(folder: Path, text: str) -> None:
    source = folder / "x_avx2.cc"
    source.write_text(text)
    subprocess.run(["g++", "-O0", "-c", str(source), "-o", f"{source}.o"], check=True)


needs_compiler = pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="needs g++ and nm")


@needs_compiler
def test_a_table_alone_is_right(tool, tmp_path, capsys):
    compiled(tmp_path, GOOD)
    assert tool.main([str(tmp_path)]) == 0
    assert "1 objects, 0 errors" in capsys.readouterr().out


@needs_compiler
@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_found(tool, tmp_path, capsys, leak):
    compiled(tmp_path, GOOD + LEAKS[leak])
    assert tool.main([str(tmp_path)]) == 1
    assert "x_avx2.cc.o exports" in capsys.readouterr().out


def test_an_empty_folder_is_an_error(tool, tmp_path, capsys):
    assert tool.main([str(tmp_path)]) == 1
    assert "build first" in capsys.readouterr().out


@needs_compiler
def test_builds_with_sanitizers_are_looked_at_where_they_are_named_only(tool, tmp_path, capsys):
    for name, on in (("plain", "OFF"), ("checked", "ON")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "CMakeCache.txt").write_text(f"A:STRING=b\nQUERN_SANITIZE:BOOL={on}\n")
    compiled(tmp_path / "plain", GOOD)
    compiled(tmp_path / "checked", GOOD + LEAKS["function"])
    assert tool.main([str(tmp_path)]) == 0
    assert "1 objects, 0 errors" in capsys.readouterr().out
    assert tool.main([str(tmp_path / "checked")]) == 1


@needs_compiler
def test_the_built_objects_leak_nothing(tool):
    folders = [path for path in (ROOT / "build").glob("*") if path.is_dir() and "sanitize" not in path.name]
    counts = {path: tool.check(path) for path in folders}
    if not any(count for count, _ in counts.values()):
        pytest.skip("the native part was not built in this checkout")
    assert [line for _, errors in counts.values() for line in errors] == []

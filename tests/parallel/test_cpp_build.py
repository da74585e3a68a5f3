"""Sources are compiled by themselves and linked to one library."""

import ctypes
import shutil
from pathlib import Path

import pytest

from parallel.cpp_build import Unavailable, compile_to

FLAGS = ("-std=c++17", "-fPIC")


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """Two files, of which the second calls the first."""
    if shutil.which("g++") is None:
        pytest.skip("there is no compiler")
    first, second = tmp_path / "first.cpp", tmp_path / "second.cpp"
    first.write_text('extern "C" int one() { return 1; }')
    second.write_text('extern "C" { int one(); int two() { return one() + one(); } }')
    return [first, second]


def test_several_sources_are_one_library(sources: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "folder" / "library.so"
    assert compile_to(target, sources, FLAGS) == target
    assert ctypes.CDLL(str(target)).two() == 2
    assert list(target.parent.iterdir()) == [target], "no temporary files are left"


def test_what_exists_is_not_compiled_again(sources: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "library.so"
    target.write_bytes(b"as it was")
    compile_to(target, sources, FLAGS)
    assert target.read_bytes() == b"as it was"


def test_a_source_that_does_not_compile_is_reported_with_the_compilers_words(sources: list[Path], tmp_path: Path) -> None:
    sources[1].write_text("int two( {")
    target = tmp_path / "library.so"
    with pytest.raises(Unavailable, match=r"second\.cpp:1"):
        compile_to(target, sources, FLAGS)
    assert not target.exists()


def test_a_symbol_that_no_source_defines_is_reported(sources: list[Path], tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="one"):
        compile_to(tmp_path / "library.so", sources[1:], (*FLAGS, "-Wl,--no-undefined"))


def test_without_a_compiler_it_says_what_to_install(sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unavailable, match=r"g\+\+"):
        compile_to(tmp_path / "library.so", sources, FLAGS)

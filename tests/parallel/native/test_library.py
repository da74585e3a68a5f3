"""Building and finding the kernels."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from parallel.cpp_build import Unavailable
from parallel.native import library, variants


def test_the_best_variant_is_chosen_by_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    vnni = avx512 | {"avx512_vnni"}
    cases = ((avx2, "avx2"), (avx512, "avx512"), (vnni, "avx512_vnni"), (vnni | {"avx512_bf16"}, "avx512_bf16"))
    monkeypatch.setattr(variants, "may_use_tiles", lambda: True)
    for has, wanted in cases:
        monkeypatch.setattr(variants, "_capabilities", lambda has=has: has)
        assert variants.usable_variants()[0] == wanted
        assert set(variants.usable_variants()) <= variants.VARIANTS.keys()
    tiles = vnni | {"avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"}
    monkeypatch.setattr(variants, "_capabilities", lambda: tiles)
    assert variants.usable_variants()[:2] == ("amx", "avx512_bf16")
    monkeypatch.setattr(variants, "may_use_tiles", lambda: False)
    assert variants.usable_variants()[0] == "avx512_bf16"
    monkeypatch.setattr(variants, "_capabilities", set)
    with pytest.raises(Unavailable, match="x86-64 with AVX2"):
        variants.usable_variants()


def test_an_old_compiler_builds_a_lesser_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """And says so: nobody would notice otherwise that everything is several times slower."""

    def old_compiler(target: Path, _sources: Sequence[Path], flags: Sequence[str]) -> Path:
        if "-mavx512bf16" in flags:
            raise Unavailable("unrecognized command-line option")
        target.touch()
        return target

    monkeypatch.setattr(library, "usable_variants", lambda: ("avx512_bf16", "avx512_vnni", "avx2"))
    monkeypatch.setattr(library, "built_path", lambda variant: tmp_path / variant)
    monkeypatch.setattr(library, "compile_to", old_compiler)
    assert library.build() == tmp_path / "avx512_vnni"
    assert "avx512_bf16 could not be built" in caplog.text
    with pytest.raises(Unavailable, match="unrecognized"):
        library.build("avx512_bf16")


def test_without_kernels_the_log_says_how_to_build_them(tmp_path: Path) -> None:
    code = "import logging; logging.basicConfig(level='INFO'); from parallel.native.library import native; print(native())"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin", "HOME": str(tmp_path)}
    folder = Path(library.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
    assert "without our own CPU kernels" in done.stderr


def test_prebuilt_kernels_are_preferred_to_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "PREBUILT", tmp_path / "brought")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MANTA_CACHE", raising=False)

    def compiler(target: Path, _sources: Sequence[Path], _flags: Sequence[str]) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
        return target

    monkeypatch.setattr(library, "compile_to", compiler)
    assert library.build("avx2").is_relative_to(tmp_path / "cache")
    brought = library.build_all()
    assert [path.name for path in brought] == [f"manta_{variant}.so" for variant in variants.VARIANTS]
    assert all(path.is_relative_to(tmp_path / "brought") for path in brought)
    assert [variants.built_path(variant) for variant in variants.VARIANTS] == brought


def test_what_is_built_is_kept_in_the_cache_that_is_set_and_removes_what_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "PREBUILT", tmp_path / "brought")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "default"))
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "set"))
    old = tmp_path / "set" / "native" / "old" / "manta_avx2.so"
    old.parent.mkdir(parents=True)
    old.touch()
    for path in (old, old.parent):
        os.utime(path, (0, 0))

    def compiler(target: Path, _sources: Sequence[Path], _flags: Sequence[str]) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
        return target

    monkeypatch.setattr(library, "compile_to", compiler)
    built = library.build("avx2")
    assert built.is_relative_to(tmp_path / "set" / "native")
    assert not old.parent.exists()
    before = tmp_path / "default" / "manta" / built.relative_to(tmp_path / "set")
    before.parent.mkdir(parents=True)
    built.rename(before)
    assert variants.built_path("avx2") == before == library.build("avx2"), "built before MANTA_CACHE was set"


@pytest.mark.slow
@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_every_variant_compiles_whatever_this_processor_is(variant: str) -> None:
    assert library.build(variant).exists()

"""A wheel is compiled where it can be, pure where it cannot, and never fails to be built unless the user says so."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).parents[2]
SWITCH = "GEVENTBATCH_COMPILE"


@pytest.fixture
def backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location("geventbatch_backend", ROOT / ".ci" / "backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A compiler and the headers, as far as one can see; the compiler's path."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "cc").touch(mode=0o755)
    monkeypatch.setenv("CC", f"'{tmp_path}/cc' -pthread")
    monkeypatch.delenv(SWITCH, raising=False)
    return tmp_path / "cc"


class Setuptools:
    """Builds nothing, and keeps what setup.py would have seen; what is compiled fails with *error*."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, backend: ModuleType, error: BaseException | None = None
    ) -> None:
        self.seen: list[str | None] = []
        self._error = error
        for name in ("build_wheel", "build_editable", "build_sdist", "prepare_metadata_for_build_wheel"):
            monkeypatch.setattr(backend.build_meta, name, self._build)

    def _build(self, directory: str, *settings: Any) -> str:
        self.seen.append(os.environ.get(SWITCH))
        if self.seen[-1] == "1" and self._error is not None:
            raise self._error
        return "compiled" if self.seen[-1] == "1" else "pure"


FAILURES = [SystemExit("error: command 'cc' failed with exit code 1"), ModuleNotFoundError("No module named 'mypyc'")]


def test_a_wheel_is_compiled_where_there_is_a_compiler(
    backend: ModuleType, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Setuptools(monkeypatch, backend)
    assert any(one.startswith("mypy==") for one in backend.get_requires_for_build_wheel())
    assert backend.build_wheel("dist") == "compiled"
    assert SWITCH not in os.environ


@pytest.mark.parametrize("missing", ["cc", "Python.h"])
def test_it_is_pure_and_needs_no_mypy_where_there_is_no_compiler_or_no_headers(
    backend: ModuleType, compiler: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    compiler.with_name(missing).unlink()
    built = Setuptools(monkeypatch, backend)
    assert backend.get_requires_for_build_wheel() == []
    assert backend.build_wheel("dist") == "pure"
    assert built.seen == ["0"]


@pytest.mark.parametrize("python", ["pypy", "no lock"])
def test_it_is_pure_on_a_python_that_mypyc_does_not_compile_for(
    backend: ModuleType, compiler: Path, monkeypatch: pytest.MonkeyPatch, python: str
) -> None:
    if python == "pypy":
        monkeypatch.setattr(sys.implementation, "name", "pypy")
    else:
        monkeypatch.setattr(sysconfig, "get_config_var", {"CC": "cc", "Py_GIL_DISABLED": 1}.get)
    assert backend.get_requires_for_build_wheel() == []


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_it_is_pure_where_compiling_fails_and_says_so(
    backend: ModuleType,
    compiler: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    built = Setuptools(monkeypatch, backend, error)
    assert backend.build_wheel("dist") == "pure"
    assert built.seen == ["1", "0"]
    said = capsys.readouterr()
    assert str(error) in said.err
    assert "this wheel is pure Python" in said.out


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_who_asks_for_the_compiled_form_gets_it_or_the_failure(
    backend: ModuleType, compiler: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setenv(SWITCH, "1")
    compiler.unlink()  # who asks is not told that there is no compiler: distutils may know of one
    assert backend.get_requires_for_build_wheel() == backend.get_requires_for_build_editable() != []
    Setuptools(monkeypatch, backend)
    assert backend.build_wheel("dist") == backend.build_editable("dist") == "compiled"
    Setuptools(monkeypatch, backend, error)
    with pytest.raises(type(error), match=str(error)[:20]):
        backend.build_wheel("dist")
    assert os.environ[SWITCH] == "1"


def test_who_asks_for_the_pure_form_gets_it_beside_a_compiler(
    backend: ModuleType, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "0")
    Setuptools(monkeypatch, backend)
    assert backend.get_requires_for_build_wheel() == []
    assert backend.build_wheel("dist") == "pure"


def test_an_editable_install_an_sdist_and_metadata_are_made_without_compiling(
    backend: ModuleType, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = Setuptools(monkeypatch, backend)
    assert backend.get_requires_for_build_editable() == backend.get_requires_for_build_sdist() == []
    for asked in ("", "0"):
        monkeypatch.setenv(SWITCH, asked)
        assert backend.build_editable("dist") == "pure"
    for asked in ("", "1"):
        monkeypatch.setenv(SWITCH, asked)
        assert backend.build_sdist("dist") == backend.prepare_metadata_for_build_wheel("dist") == "pure"
        assert os.environ[SWITCH] == asked
    assert built.seen == ["0"] * 6


def test_another_word_than_0_or_1_is_refused_by_name(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "yes")
    with pytest.raises(SystemExit, match="GEVENTBATCH_COMPILE=yes: 1 compiles or fails, 0 does not compile"):
        backend.get_requires_for_build_wheel()

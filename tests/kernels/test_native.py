"""Building and caching native code."""

import multiprocessing

import pytest
from leap_kernels import native


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "tiny.cpp").write_text('extern "C" int tiny() { return 1; }')
    return tmp_path


def build_tiny(_):
    return native.build("tiny", tune_for_host=True)


def test_processes_that_start_together_share_one_library(sources, monkeypatch):
    monkeypatch.setattr(native, "_SOURCES", sources)
    monkeypatch.setenv("LEAP_NATIVE_CACHE", str(sources / "cache"))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        built = set(pool.map(build_tiny, range(3), chunksize=1))
    assert built == set((sources / "cache").iterdir())
    assert len(built) == 1


def load(name):
    return native.load.__wrapped__(name, tune_for_host=True)  # past the cache of the process


@pytest.fixture(autouse=True)
def native_code_is_on(monkeypatch):
    monkeypatch.delenv("LEAP_NATIVE", raising=False)


def test_without_a_compiler_one_warning_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler found"):
        assert load("mask_ops") is None


def test_compiler_errors_are_quoted(monkeypatch, sources):
    (sources / "broken.cpp").write_text("int f( {")
    monkeypatch.setattr(native, "_SOURCES", sources)
    monkeypatch.setenv("LEAP_NATIVE_CACHE", str(sources / "cache"))
    with pytest.warns(RuntimeWarning, match="broken"):
        assert load("broken") is None


def test_native_code_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("LEAP_NATIVE", "0")
    assert load("mask_ops") is None

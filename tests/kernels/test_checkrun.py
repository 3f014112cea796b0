"""Runs of checks under a budget: what is recorded, what counts as failed, what is left out."""

import json
import time

import pytest
import torch
from leap_kernels.benchmarks.checkrun import CheckRun, Records, poisoned_memory, relative_error
from leap_kernels.benchmarks.graph_timing import event_seconds, launch_seconds, replayed, rotating
from leap_kernels.benchmarks.matrices import copied, random_matrix
from leap_kernels.idx8 import from_bmp128

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path):
    return CheckRun(CPU, True, Records(tmp_path / "out" / "x.jsonl"), "step", time.monotonic() + 60)


@pytest.fixture
def lines(tmp_path):
    return lambda: [json.loads(line) for line in (tmp_path / "out" / "x.jsonl").read_text().splitlines()]


def test_results_are_on_the_disk_at_once(run, lines):
    run.figure("speed", us=1 / 3, where=None)
    assert lines() == [{"step": "step", "name": "speed", "us": 0.33333, "where": None}]
    run.check("right", True)
    run.check("wrong", False, error=float("nan"))
    assert [line.get("passed") for line in lines()] == [None, True, False]
    assert lines()[2]["error"] == "nan"
    assert run.failed == ["step: wrong"]


def test_an_error_is_a_failed_check_and_the_rest_goes_on(run, lines):
    with run.guarded("product"):
        raise ValueError("no such kernel")
    run.figure("next")
    assert run.failed == ["step: product"]
    assert lines()[0]["error"] == "ValueError: no such kernel"
    assert lines()[1]["name"] == "next"


def test_what_the_time_does_not_allow_is_named(run, lines):
    assert list(run.affordable([1, 2])) == [1, 2]
    run.until = time.monotonic() - 1
    assert list(run.affordable([1, 2], lambda n: f"case {n}")) == []
    assert lines()[0]["items"] == ["case 1", "case 2"]


def test_elements_that_nobody_wrote_are_seen():
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
        assert relative_error(torch.empty(3), torch.ones(3)) == float("inf")
    assert not torch.are_deterministic_algorithms_enabled()
    assert relative_error(torch.full((4,), 1.5), torch.ones(4)) == pytest.approx(0.5)


def test_calls_are_timed_in_turn_on_a_cpu_too():
    seen = []
    timed = replayed({"a": [lambda: seen.append("a")], "b": [lambda: seen.append("b"), lambda: seen.append("c")]}, CPU)
    assert {name: len(values) for name, values in timed.items()} == {"a": 1, "b": 2}
    assert set(seen) == {"a", "b", "c"}
    assert rotating(dict, 100, CPU) == [{}]
    assert event_seconds(lambda: time.sleep(0.002), CPU, 3, calls=2)[0] >= 0.002
    assert set(launch_seconds(lambda: None, CPU, 2)) == {"host_us", "eager_us"}


def test_copies_lie_in_memory_of_their_own():
    packed = random_matrix((9, 130), 0.5, torch.bfloat16, CPU)
    for matrix in (packed, from_bmp128(packed)):
        other = copied(matrix)
        assert torch.equal(other.unpack(), matrix.unpack())
        assert other.vals.data_ptr() != matrix.vals.data_ptr()

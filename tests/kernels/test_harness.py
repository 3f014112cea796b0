"""The benchmark harness in its smoke mode: what it records, that it draws, and that it claims no GPU."""

import csv

import pytest
import torch
from leap_kernels.benchmarks import harness, timing
from leap_kernels.benchmarks.products import COPY, DENSE, READ, Timing, reference

RECORDED = {
    *("device", "clock_mhz", "memory_clock_mhz", "driver", "cuda", "torch", "triton", "time"),
    *("out", "in", "batch", "dtype", "sparsity", "mask"),
    *("bytes_bits", "bytes_off", "bytes_vals", "bytes_index", "bytes", "runs", "p10_us", "median_us", "p90_us"),
    *("gb_per_s", "stream_gb_per_s", "share_of_stream", "speedup", "byte_limit", "share_of_limit", "error"),
}


def test_smoke_mode_records_what_a_gpu_run_must(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    try:
        harness.main(["--smoke", "--out", str(tmp_path), "--sparsity", "0.5", "0.9", "--batch", "1", "3"])
    finally:
        torch.set_num_threads(threads)
    assert harness.NO_GPU in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "speed.csv").open()))
    assert set(rows[0]) >= RECORDED
    assert {row["device"] for row in rows} == {timing.cpu_name()}
    assert {(row["batch"], row["dtype"]) for row in rows} == {
        (batch, dtype) for batch in ("1", "3") for dtype in ("bfloat16", "float32")
    }
    for row in rows:
        assert int(row["runs"]) >= 3
        assert float(row["p10_us"]) <= float(row["median_us"]) <= float(row["p90_us"])
        if row["kernel"] == "bitmap":
            assert float(row["error"]) < (1e-6 if row["dtype"] == "float32" else 1e-2)
            assert int(row["bytes"]) == sum(int(row[f"bytes_{part}"]) for part in ("bits", "off", "vals"))
        elif row["kernel"] == DENSE:
            assert float(row["speedup"]) == 1
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_masks_have_their_sparsity_and_rows_are_equal():
    assert harness.make_mask("random", (64, 512), 0.75).float().mean() == pytest.approx(0.25, abs=0.01)
    assert (harness.make_mask("rows", (64, 512), 0.75).sum(1) == 128).all()


def test_calls_take_turns_for_the_time_and_the_runs_asked_for():
    seen = []
    timed = timing.interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 0.0, least=4)
    assert [len(values) for values in timed.values()] == [4, 4]
    assert all(set(seen[i : i + 2]) == {"a", "b"} for i in range(0, len(seen), 2))
    assert timing.interleaved({"a": seen.clear}, 0.0, timer=lambda _: 7.0, least=2) == {"a": [7.0, 7.0]}


def test_the_stream_is_the_devices_own():
    read, copy = Timing([1.0], 10), Timing([2.0], 10)
    assert reference({READ: read}) is read
    assert reference({COPY: copy}) is copy
    assert (read.bandwidth, copy.bandwidth) == (10, 5)

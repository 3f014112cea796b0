"""Every kernel once on small odd shapes, in a process of its own for compute-sanitizer."""

import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[:] = [str(Path(__file__).resolve().parents[2]), *sys.path[1:]]
    from leap_kernels.benchmarks.gpu_correctness import smallest_case

    smallest_case(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

"""Time per weight of the sampled-mask forward and backward on a CPU: native code against plain PyTorch.

python -m leap_kernels.benchmarks.mask_ops [--millions 20] [--threads 1] [--seconds 4] [--dtype float32]
"""

import argparse
from typing import Any

import torch

from leap_kernels.benchmarks.timing import interleaved, machine, quantile
from leap_kernels.mask_ops import mask_backward, mask_forward
from leap_kernels.mask_reference import MaskScalars, mask_backward_reference, mask_forward_reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=20, help="weights, in millions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4, help="per table row, in all")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.millions:g} M weights, {arguments.dtype}; {machine()}")

    size = int(arguments.millions * 1e6)
    weight = torch.randn(size).to(getattr(torch, arguments.dtype))
    grad, out = torch.randn_like(weight), torch.empty_like(weight)
    logits = torch.randn(size) * 0.05
    grad_logits, stats_grad = torch.empty_like(logits), torch.tensor([0.1, 0.1, 0.0])
    part = slice(0, size // 20)  # the reference is some fifty times slower
    small = weight[part], logits[part]
    for noise in (True, False):
        scalars: dict[str, Any] = {"scale": 100.0, "temperature": 0.5, "seed": 1, "layer": 2, "step": 3, "noise": noise}
        reference = MaskScalars(**scalars)
        variants = {
            "forward native": lambda s=scalars: mask_forward(weight, logits, out=out, **s),
            "backward native": lambda s=scalars: mask_backward(grad, weight, logits, stats_grad, out=grad_logits, **s),
            "forward PyTorch": lambda r=reference: mask_forward_reference(*small, out[part], r),
            "backward PyTorch": lambda r=reference: mask_backward_reference(
                grad[part], *small, stats_grad, grad_logits[part], r
            ),
        }
        for name, durations in interleaved(variants, arguments.seconds).items():
            count = size if "native" in name else size // 20
            p20, p50, p80 = (quantile(durations, q) / count * 1e9 for q in (0.2, 0.5, 0.8))
            label = f"{name}, {'noise' if noise else 'no noise'}"
            print(f"{label:28} {p50:8.2f} ns/weight  [{p20:.2f}, {p80:.2f}]  {len(durations)} runs")


if __name__ == "__main__":
    main()

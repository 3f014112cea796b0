"""Time per weight of what a step of learning does on a CPU besides the model: native code against plain PyTorch.

Sampled mask forward and backward, a step of packed Adam, and the counts that find a cut through all logits; and per
logit of an output over 49 152 tokens, its losses and their gradient.

python -m leap_kernels.benchmarks.mask_ops [--millions 20] [--threads 1] [--seconds 4] [--dtype float32]
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from leap_kernels.adam8bit import NO_MOMENTS, AdamStep, adam8bit, adam8bit_reference
from leap_kernels.benchmarks.timing import interleaved, machine, quantile
from leap_kernels.mask_ops import mask_backward, mask_forward
from leap_kernels.mask_reference import MaskScalars, mask_backward_reference, mask_forward_reference
from leap_kernels.output_losses import (
    output_losses,
    output_losses_backward,
    output_losses_backward_reference,
    output_losses_reference,
)
from leap_kernels.radix_counts import count_high, count_low


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

    def show(name: str, durations: list[float], count: int | None = None) -> None:
        count = count or (size if "native" in name else size // 20)
        p20, p50, p80 = (quantile(durations, q) / count * 1e9 for q in (0.2, 0.5, 0.8))
        print(f"{name:28} {p50:8.2f} ns/weight  [{p20:.2f}, {p80:.2f}]  {len(durations)} runs")

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
            show(f"{name}, {'noise' if noise else 'no noise'}", durations)

    moments, step = torch.full((size,), NO_MOMENTS, dtype=torch.int16), AdamStep(1e-3, (0.9, 0.95), 1, 2, 3)
    grads = torch.randn(size) * 1e-4
    others = {
        "Adam native": lambda: adam8bit(logits, grads, moments, step),
        "Adam PyTorch": lambda: adam8bit_reference(logits[part], grads[part], moments[part], step),
        "counts native": lambda: count_low(logits, int(count_high(logits).argmax())),
    }
    for name, durations in interleaved(others, arguments.seconds).items():
        show(name, durations)

    student, teacher = torch.randn(2, 512, 49152).to(weight.dtype)
    targets = torch.randint(student.shape[1], (len(student),))

    def losses(forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        _, log_sums = forward(student, targets, teacher)
        backward(student, targets, teacher, log_sums, 0.5, 0.5)

    both = {
        "losses native": lambda: losses(output_losses, output_losses_backward),
        "losses PyTorch": lambda: losses(output_losses_reference, output_losses_backward_reference),
    }
    for name, durations in interleaved(both, arguments.seconds).items():
        show(name, durations, student.numel())


if __name__ == "__main__":
    main()

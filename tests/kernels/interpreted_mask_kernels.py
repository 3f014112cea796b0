"""Runs the Triton mask kernels on CPU tensors, under TRITON_INTERPRET=1, and compares them with float64.

A script rather than a test because Triton reads the variable when it is imported; test_mask_triton.py starts it.
"""

import torch
from leap_kernels import mask_forward_triton as forward
from leap_kernels.mask_backward_triton import mask_backward_triton
from leap_kernels.mask_forward_triton import mask_forward_triton
from leap_kernels.mask_reference import MaskScalars, mask_backward_reference, mask_forward_reference


def check(size: int, offset: int, noise: bool, weight_dtype: torch.dtype, logits_dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(size, generator=generator).to(weight_dtype)
    logits = (torch.randn(size, generator=generator) * 0.05).to(logits_dtype)
    grad = torch.randn(size, generator=generator).to(weight_dtype)
    stats_grad = torch.tensor([0.3, -0.2, 0.7])
    scalars = MaskScalars(scale=60, temperature=0.7, seed=seed, layer=7, step=1, noise=noise, offset=offset)
    # The interpreter truncates to bfloat16 where hardware rounds.
    rtol = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}

    masked64, grad64 = torch.empty(2, size, dtype=torch.float64)
    wide = torch.float64
    stats64 = mask_forward_reference(weight.double(), logits.double(), masked64, scalars, compute_dtype=wide)
    arguments = (weight.double(), logits.double(), stats_grad.double())
    mask_backward_reference(grad.double(), *arguments, grad64, scalars, compute_dtype=wide)

    masked, grad_logits = torch.empty_like(weight), torch.empty_like(logits)
    for config in (None, *forward.candidates()):
        masked.fill_(torch.nan)
        stats = mask_forward_triton(weight, logits, masked, scalars, config)
        torch.testing.assert_close(masked.double(), masked64, rtol=rtol[weight_dtype], atol=1e-7)
        torch.testing.assert_close(stats, stats64, rtol=1e-6, atol=1e-6)
    mask_backward_triton(grad, weight, logits, stats_grad, grad_logits, scalars)
    torch.testing.assert_close(grad_logits.double(), grad64, rtol=rtol[logits_dtype], atol=1e-4)


check(3000, 0, True, torch.float32, torch.float32, seed=5)
check(3000, 0, False, torch.float32, torch.float32, seed=5)
check(1025, 3, True, torch.bfloat16, torch.float32, seed=(1 << 63) + 12345)
check(1, 1022, True, torch.float16, torch.bfloat16, seed=1)
check(9000, 0, True, torch.float32, torch.float32, seed=5)
check(127, (1 << 34) - 50, True, torch.float32, torch.float32, seed=1 << 40)
print("interpreted kernels agree")

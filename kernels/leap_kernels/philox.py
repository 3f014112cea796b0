"""Counter-based randomness: Philox4x32-10 in plain PyTorch, and logistic noise made from it.

Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

Counter layout, shared by every implementation in this package (PyTorch, C++, Triton). Weight ``i``, the flat row-major
index in the *whole* weight matrix [out, in], uses word ``i & 3`` of the block with

    counter = (lo32(i >> 2), hi32(i >> 2), step, layer)        key = (lo32(seed), hi32(seed))

so noise depends only on (seed, layer, step, i): not on the device, the number of workers or how the matrix is sharded.

From a word to noise: ``u = ((word >> 9) + 0.5) * 2**-23`` in (0, 1), and ``g = log(u) - log(1 - u)``, a sample of
Logistic(0, 1). 23 bits, because with 24 the float32 value of u can round to 1.
"""

import torch
from torch import Tensor

_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def check_stream(seed: int, layer: int, step: int, offset: int) -> None:
    """Raise ValueError unless the numbers fit the counter: seed < 2**64, layer and step < 2**32, offset < 2**63."""
    for name, value, bits in (("seed", seed, 64), ("layer", layer, 32), ("step", step, 32), ("offset", offset, 63)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name}={value} does not fit: 0 <= {name} < 2**{bits}")


def philox4x32_10(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words per counter.

    counter: four int64 tensors of one shape with values in [0, 2**32); key: two integers in [0, 2**32).
    Returns four int64 tensors of that shape with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    m0, m1 = _ROUND_MULTIPLIERS
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, which leaves the bits of the unsigned product.
        product0, product1 = c0 * m0, c2 * m1
        c0 = ((product1 >> 32) & _WORD) ^ c1 ^ k0
        c1 = product1 & _WORD
        c2 = ((product0 >> 32) & _WORD) ^ c3 ^ k1
        c3 = product0 & _WORD
        k0 = (k0 + _KEY_INCREMENTS[0]) & _WORD
        k1 = (k1 + _KEY_INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def random_words(
    count: int, *, seed: int, layer: int, step: int, offset: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """The words of weights ``offset .. offset + count``: int64 [count] with values in [0, 2**32)."""
    check_stream(seed, layer, step, offset)
    first_block, skip = offset >> 2, offset & 3
    blocks = torch.arange(first_block, first_block + (skip + count + 3) // 4, dtype=torch.int64, device=device)
    counter = (blocks & _WORD, blocks >> 32, torch.full_like(blocks, step), torch.full_like(blocks, layer))
    words = philox4x32_10(counter, (seed & _WORD, seed >> 32))
    return torch.stack(words, dim=-1).flatten()[skip : skip + count]


def logistic_noise(
    count: int,
    *,
    seed: int,
    layer: int,
    step: int,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Logistic(0, 1) noise [count] of weights ``offset .. offset + count``, in ``dtype`` (float32 or float64)."""
    u = _uniform(random_words(count, seed=seed, layer=layer, step=step, offset=offset, device=device), dtype)
    return torch.log(u) - torch.log1p(-u)


def gumbel_noise(
    count: int,
    *,
    seed: int,
    layer: int,
    step: int,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Gumbel(0, 1) noise [count], −log(−log u), of logits ``offset .. offset + count``; see :func:`logistic_noise`."""
    u = _uniform(random_words(count, seed=seed, layer=layer, step=step, offset=offset, device=device), dtype)
    return -torch.log(-torch.log(u))


def _uniform(words: Tensor, dtype: torch.dtype) -> Tensor:
    return ((words >> 9).to(dtype) + 0.5) * 2.0**-23

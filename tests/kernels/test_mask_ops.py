"""Sampled masks: counters, values, gradients, shards, determinism, for the native and the PyTorch path."""

import math

import numpy as np
import pytest
import torch
from leap_kernels import mask_backward, mask_forward, mask_ops
from leap_kernels.mask_reference import MaskScalars, mask_backward_reference, mask_forward_reference
from leap_kernels.philox import logistic_noise, philox4x32_10, random_words

STREAM = {"seed": 0x1234_5678_9ABC_DEF0, "layer": 7, "step": 3}
SCALARS = {**STREAM, "scale": 60.0, "temperature": 0.7}
# Sizes around the block of 4, the vector, the tile of 1024 and the chunk of 16384.
SIZES = [0, 1, 3, 4, 127, 1024, 1025, 16384, 40001]


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native":
        assert mask_ops.native_library() is not None
    else:
        monkeypatch.setattr(mask_ops, "native_library", lambda: None)
    return request.param


def make(size: int, weight_dtype=torch.float32, logits_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, generator=generator).to(weight_dtype)
    logits = (torch.randn(size, generator=generator) * 0.05).to(logits_dtype)
    grad = torch.randn(size, generator=generator).to(weight_dtype)
    return weight, logits, grad


def numpy_philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 once more, in unsigned arithmetic. counter: uint64 [4, n] of 32-bit values; returns the same."""
    c, k = counter.astype(np.uint64), list(key)
    word, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = np.stack(
            [(p1 >> shift) ^ c[1] ^ np.uint64(k[0]), p1 & word, (p0 >> shift) ^ c[3] ^ np.uint64(k[1]), p0 & word]
        )
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def numpy_words(count: int, offset: int) -> np.ndarray:
    index = np.arange(offset, offset + count, dtype=np.uint64)
    block = index >> np.uint64(2)
    same = np.ones_like(block)
    counter = np.stack(
        [block & np.uint64(0xFFFFFFFF), block >> np.uint64(32), same * STREAM["step"], same * STREAM["layer"]]
    )
    words = numpy_philox(counter, (STREAM["seed"] & 0xFFFFFFFF, STREAM["seed"] >> 32))
    return words[(index & np.uint64(3)).astype(int), np.arange(count)]


# Known-answer vectors of Random123 (kat_vectors, philox4x32, 10 rounds).
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    assert numpy_philox(np.array(counter, dtype=np.uint64)[:, None], tuple(key))[:, 0].tolist() == expected
    words = philox4x32_10(tuple(torch.tensor(c) for c in counter), tuple(key))
    assert [int(word) for word in words] == expected


# The third offset crosses 2^34, where the block number needs its upper counter word.
@pytest.mark.parametrize("offset", [0, 5, (1 << 34) - 6])
@pytest.mark.parametrize("count", [0, 1, 3, 1024, 2049])
def test_words_agree_bit_for_bit(count, offset):
    expected = numpy_words(count, offset)
    assert np.array_equal(random_words(count, offset=offset, **STREAM).numpy(), expected.astype(np.int64))
    library = mask_ops.native_library()
    if library is None:
        pytest.skip("no C++ compiler")
    words = np.empty(count, dtype=np.uint32)
    library.leap_philox_words(words.ctypes.data, count, offset, STREAM["seed"], STREAM["layer"], STREAM["step"])
    assert np.array_equal(words, expected.astype(np.uint32))


def test_noise_is_logistic():
    noise = logistic_noise(400_000, seed=11, layer=0, step=0)
    assert abs(noise.mean().item()) < 4 * math.pi / math.sqrt(3 * 400_000)
    assert abs(noise.var().item() / (math.pi**2 / 3) - 1) < 0.02
    other = [
        logistic_noise(400_000, **{"seed": 11, "layer": 0, "step": 0, **change})
        for change in ({"step": 1}, {"layer": 1}, {"seed": 12})
    ]
    for sample in other:
        assert abs(torch.corrcoef(torch.stack([noise, sample]))[0, 1].item()) < 0.01


def test_native_noise_is_accurate(path):
    """Recover g from M at P ~ 0: M = sigmoid(g), so dM/dP / scale = sigmoid'(g) is checked in relative terms too."""
    size = 200_000
    logits, ones = torch.zeros(size), torch.ones(size)
    masked, _ = mask_forward(ones, logits, scale=1.0, temperature=1.0, noise=True, **STREAM)
    u = (random_words(size, **STREAM) >> 9).double().add(0.5) * 2.0**-23
    assert ((masked.double() - u).abs() / u).max() < 1e-6
    slope = mask_backward(ones, ones, logits, torch.zeros(3), scale=1.0, temperature=1.0, noise=True, **STREAM)
    assert ((slope.double() - u * (1 - u)).abs() / (u * (1 - u))).max() < 1e-6


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_forward_matches_float64(path, size, noise):
    weight, logits, _ = make(size)
    scalars = MaskScalars(**SCALARS, noise=noise, offset=2)
    expected = torch.empty(size, dtype=torch.float64)
    stats64 = mask_forward_reference(weight.double(), logits.double(), expected, scalars, compute_dtype=torch.float64)
    masked, stats = mask_forward(weight, logits, **SCALARS, noise=noise, offset=2)
    assert masked.dtype == torch.float32
    assert stats.dtype == torch.float64
    # Errors of the pre-activation, |z| <= 40 with 24 bits, pass into the relative error of small masks.
    torch.testing.assert_close(masked.double(), expected, rtol=6e-6, atol=1e-12)
    torch.testing.assert_close(stats, stats64, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_backward_matches_float64_autograd(path, size, noise):
    weight, logits, grad = make(size)
    stats_grad = torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64)
    p = logits.double().requires_grad_()
    g = logistic_noise(size, offset=9, dtype=torch.float64, **STREAM) if noise else 0.0
    mask = torch.sigmoid((SCALARS["scale"] * p + g) / SCALARS["temperature"])
    masked = mask * weight.double()
    stats = torch.stack([mask.sum(), masked.square().sum(), torch.sigmoid(SCALARS["scale"] * p).sum()])
    ((masked * grad.double()).sum() + (stats * stats_grad).sum()).backward()
    got = mask_backward(grad, weight, logits, stats_grad, **SCALARS, noise=noise, offset=9)
    torch.testing.assert_close(got.double(), p.grad, rtol=6e-6, atol=1e-5)


def test_density_term_is_skipped_only_when_unused(path):
    weight, logits, grad = make(1000)
    for stats_grad in (torch.zeros(3), torch.tensor([0.0, 0.0, 2.0])):
        expected = torch.empty(1000, dtype=torch.float64)
        args = (grad.double(), weight.double(), logits.double(), stats_grad, expected)
        mask_backward_reference(*args, MaskScalars(**SCALARS, noise=True), compute_dtype=torch.float64)
        got = mask_backward(grad, weight, logits, stats_grad, **SCALARS, noise=True)
        torch.testing.assert_close(got.double(), expected, rtol=6e-6, atol=1e-5)


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(path, weight_dtype, logits_dtype):
    """Storage types only round inputs and outputs: the same numbers as float32 give the same results, rounded."""
    weight, logits, grad = make(3001, weight_dtype, logits_dtype)
    masked, stats = mask_forward(weight, logits, **SCALARS, noise=True)
    wide, wide_stats = mask_forward(weight.float(), logits.float(), **SCALARS, noise=True)
    assert masked.dtype == weight_dtype
    assert torch.equal(masked, wide.to(weight_dtype))
    assert torch.equal(stats, wide_stats)
    stats_grad = torch.tensor([0.3, -0.2, 0.7])
    grad_logits = mask_backward(grad, weight, logits, stats_grad, **SCALARS, noise=True)
    wide_grad = mask_backward(grad.float(), weight.float(), logits.float(), stats_grad, **SCALARS, noise=True)
    assert grad_logits.dtype == logits_dtype
    assert torch.equal(grad_logits, wide_grad.to(logits_dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_native_rounds_like_torch(dtype):
    """With M = 1 forward is a conversion to float and back: every 16-bit pattern must survive, NaN as NaN."""
    if mask_ops.native_library() is None:
        pytest.skip("no C++ compiler")
    weight = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    ones = torch.full((1 << 16,), 1e3)
    kept, _ = mask_forward(weight, ones, **SCALARS, noise=False)
    assert torch.equal(kept.isnan(), weight.isnan())
    assert torch.equal(kept.view(torch.int16)[~weight.isnan()], weight.view(torch.int16)[~weight.isnan()])


def test_native_rounds_to_half_like_torch():
    """M = sigmoid spreads results over all binades of float16, subnormal ones and halfway cases included."""
    if mask_ops.native_library() is None:
        pytest.skip("no C++ compiler")
    generator = torch.Generator().manual_seed(5)
    weight = (torch.randn(60_000, generator=generator) * 10 ** torch.empty(60_000).uniform_(-9, 4.5)).to(torch.float16)
    logits = torch.randn(60_000, generator=generator)
    masked, _ = mask_forward(weight, logits, scale=1.0, temperature=1.0, noise=True, **STREAM)
    wide, _ = mask_forward(weight.float(), logits, scale=1.0, temperature=1.0, noise=True, **STREAM)
    assert torch.equal(masked, wide.to(torch.float16))


@pytest.mark.parametrize("cut", [1, 1024, 7777])
def test_shards_equal_the_whole(path, cut):
    """What ZeRO-3 shards rely on. Elements bit for bit, but for torch, whose loops treat tails differently."""

    def same(part, whole):
        return torch.equal(part, whole) if path == "native" else torch.allclose(part, whole, rtol=1e-5, atol=1e-6)

    weight, logits, grad = make(20_011)
    stats_grad = torch.tensor([0.3, -0.2, 0.7])
    whole, stats = mask_forward(weight, logits, **SCALARS, noise=True, offset=6)
    whole_grad = mask_backward(grad, weight, logits, stats_grad, **SCALARS, noise=True, offset=6)
    sums = torch.zeros(3, dtype=torch.float64)
    for part, offset in ((slice(None, cut), 6), (slice(cut, None), 6 + cut)):
        masked, part_stats = mask_forward(weight[part], logits[part], **SCALARS, noise=True, offset=offset)
        part_grad = mask_backward(
            grad[part], weight[part], logits[part], stats_grad, **SCALARS, noise=True, offset=offset
        )
        assert same(masked, whole[part])
        assert same(part_grad, whole_grad[part])
        sums += part_stats
    torch.testing.assert_close(sums, stats, rtol=1e-6, atol=0)


def test_results_do_not_depend_on_threads(path):
    weight, logits, grad = make(200_003)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            masked, stats = mask_forward(weight, logits, **SCALARS, noise=True)
            results.append((masked, stats, mask_backward(grad, weight, logits, stats, **SCALARS, noise=True)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_in_place_outputs(path):
    weight, logits, grad = make(5000)
    stats_grad = torch.tensor([0.3, -0.2, 0.7])
    expected = mask_backward(grad, weight, logits, stats_grad, **SCALARS, noise=True)
    got = mask_backward(grad, weight, logits, stats_grad, **SCALARS, noise=True, out=grad)
    assert got is grad
    assert torch.equal(got, expected)
    scratch = torch.full_like(weight, torch.nan)
    masked, _ = mask_forward(weight, logits, **SCALARS, noise=True, out=scratch)
    assert masked is scratch
    assert torch.equal(masked, mask_forward(weight, logits, **SCALARS, noise=True)[0])


def test_extreme_logits(path):
    """Far beyond the range of exp the mask is exactly 0 or 1, its slope 0; NaN stays NaN."""
    logits = torch.tensor([-1e30, -100.0, 100.0, 1e30, torch.nan])
    ones = torch.ones(5)
    masked, _ = mask_forward(ones, logits, **SCALARS, noise=True)
    assert masked[:4].tolist() == [0, 0, 1, 1]
    assert masked[4].isnan()
    slope = mask_backward(ones, ones, logits, torch.ones(3), **SCALARS, noise=True)
    assert slope[:4].tolist() == [0] * 4
    assert slope[4].isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0.0}, "scale"),
        ({"temperature": -1.0}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"layer": 1 << 32}, "layer"),
        ({"offset": -1}, "offset"),
        ({"logits": torch.zeros(4)}, "logits"),
        ({"logits": torch.zeros(5, dtype=torch.float16)}, "logits"),
        ({"weight": torch.zeros(10)[::2]}, "contiguous"),
        ({"out": torch.zeros(5, dtype=torch.bfloat16)}, "out"),
    ],
)
def test_bad_arguments_name_themselves(change, message):
    arguments = {"weight": torch.zeros(5), "logits": torch.zeros(5), "noise": True, **SCALARS, **change}
    with pytest.raises(ValueError, match=message):
        mask_forward(**arguments)


def test_closing_masks_make_no_subnormal_numbers():
    """A matrix product with one in a hundred of them takes twenty times as long."""
    assert mask_ops.native_library() is not None
    generator = torch.Generator().manual_seed(0)
    weight, logits = torch.randn(2, 1 << 16, generator=generator)
    closing = {**SCALARS, "scale": 1.0, "temperature": 0.02, "noise": False}
    masked, _ = mask_forward(weight, logits, **closing)
    grad = mask_backward(weight * 1e-6, weight, logits, torch.zeros(3), **closing)
    smallest = torch.finfo(torch.float32).smallest_normal
    for values in (masked, grad):
        assert not ((values != 0) & (values.abs() < smallest)).any()
        assert (values != 0).float().mean() > 0.5

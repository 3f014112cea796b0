"""Reading BMP128 in Triton, shared by the kernels that do.

A lane takes 8 neighbouring columns of a group. It finds the first one's value by counting the mask bits below it, and
the others' by stepping over values: a column's value is loaded whether it is kept or not, since what stands there can
always be read, and the caller drops it by :func:`kept`. The forms below were chosen by the instructions that the
compiler makes of them for sm_90: 11 per weight in the GEMV, against 15 with masked loads and a rank for each column.

``tl.max_contiguous`` says where places are loaded from that neighbouring lanes are to have neighbouring columns: as far
as Triton 3.6 knows, any axis would do, and it takes the rows. The places are not contiguous, but are aligned to one
element only, so that nothing else follows.
"""

import triton
import triton.language as tl


@triton.jit
def popcount(v):
    """Bits set in each uint32, as int32. The compiler recognises the pattern: one POPC."""
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return ((v * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def load_group(bits_ptr, off_ptr, entry):
    """(quad, off) of groups: their 4 words each, and where their first values stand.

    entry: int64 [rows, lanes], row * groups + group.
    """
    words = bits_ptr + (entry[:, :, None] * 4 + tl.arange(0, 4)[None, None, :])
    quad = tl.load(tl.max_contiguous(words, [1, 2, 4]))
    return quad.to(tl.uint32, bitcast=True), tl.load(tl.max_contiguous(off_ptr + entry, [1, 2]))


@triton.jit
def lane_bits(quad, off, lane, present):
    """(octet, rank): bit k of octet says whether the lane's column k is kept; its first value stands at rank.

    quad, off: of the lane's group, from :func:`load_group`. lane: int32 [1, lanes], its number 0 .. 15 in the group.
    present: False drops the group. Bits 8 and up of octet are arbitrary.
    """
    even, odd = tl.split(tl.reshape(quad, [off.shape[0], off.shape[1], 2, 2]))
    word0, word2 = tl.split(even)
    word1, word3 = tl.split(odd)
    index = lane // 4
    word = tl.where(index < 2, tl.where(index == 0, word0, word1), tl.where(index == 2, word2, word3))
    word = tl.where(present, word, 0)
    shift = ((lane % 4) * 8).to(tl.uint32)
    below = (tl.full([1, 1], 1, tl.uint32) << shift) - 1
    rank = popcount(word & below) + off
    rank += tl.where(index > 0, popcount(word0), 0)
    rank += tl.where(index > 1, popcount(word1), 0)
    rank += tl.where(index > 2, popcount(word2), 0)
    return word >> shift, rank


@triton.jit
def kept(octet, column: tl.constexpr):
    return (octet & (1 << column)) != 0


@triton.jit
def lane_values(vals, rank, octet):
    """8 tensors, one for each of the lane's columns: its value where it is kept, else another one.

    vals + rank: pointers to the lanes' first values.
    """
    values = vals + rank
    columns = ()  # a tuple grows by addition: Triton does not unpack
    for k in tl.static_range(8):
        columns = columns + (tl.load(tl.max_contiguous(values, [1, 2])),)  # type: ignore[assignment]  # noqa: RUF005
        values = tl.where(kept(octet, k), values + 1, values)
    return columns


@triton.jit
def split_columns(x):
    """[lanes * 8] as 8 tensors [lanes]: the first columns of all lanes, the second ones, ..."""
    # Column 4 h + 2 i + j for (h, i, j) in the reshaped tile; split takes the last axis apart.
    even, odd = tl.split(tl.reshape(x, [x.shape[0] // 8, 2, 2, 2]))
    even_low, even_high = tl.split(even)
    odd_low, odd_high = tl.split(odd)
    x0, x4 = tl.split(even_low)
    x2, x6 = tl.split(even_high)
    x1, x5 = tl.split(odd_low)
    x3, x7 = tl.split(odd_high)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def join_columns(columns):
    """The inverse for tiles: 8 tensors [rows, lanes] as [rows, lanes * 8]."""
    even = tl.join(tl.join(columns[0], columns[4]), tl.join(columns[2], columns[6]))
    odd = tl.join(tl.join(columns[1], columns[5]), tl.join(columns[3], columns[7]))
    return tl.reshape(tl.join(even, odd), [columns[0].shape[0], columns[0].shape[1] * 8])

"""BMP128: the package's sparse matrix format, one bit per weight plus the values that are kept.

For a matrix [N, K], with Kp = K rounded up to a multiple of 128 and G = Kp / 128 groups per row:

    bits      uint32 [N, G, 4]   least significant bit of a word = its lowest column; 0 beyond column K
    off       int32  [N, G]      index in vals of the group's first value
    row_base  int64  [N]         only if there are 2**31 values or more: added to off, which then counts within its row
    vals      [nnz + 64]         kept values, row-major, in the matrix's own dtype; then 64 zeros, so that vector loads
                                 that start at any value stay inside the array

``kernels/README.md`` is the specification for readers in other languages.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 128
PADDING = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OFFSET_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class BMP128:
    """A packed matrix. Build it with :func:`pack`, or from stored tensors with :meth:`from_tensors`."""

    shape: tuple[int, int]
    bits: Tensor
    off: Tensor
    vals: Tensor
    row_base: Tensor | None = None

    @property
    def nnz(self) -> int:
        return self.vals.numel() - PADDING

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for name, tensor in self.tensors().items() if name != "shape")

    def mask(self) -> Tensor:
        """Which weights are kept: bool [N, K]."""
        rows, columns = self.shape
        groups = self.bits.shape[1]
        octets = self.bits.view(torch.uint8).view(rows, groups * 16, 1)
        positions = torch.arange(8, dtype=torch.uint8, device=octets.device)
        return ((octets >> positions) & 1).view(rows, groups * GROUP)[:, :columns].bool()

    def unpack(self) -> Tensor:
        """The dense matrix [N, K]: the kept values bit for bit, +0 elsewhere."""
        dense = torch.zeros(self.shape, dtype=self.vals.dtype, device=self.vals.device)
        dense[self.mask()] = self.vals[: self.nnz]
        return dense

    def to(self, device: torch.device | str) -> "BMP128":
        row_base = None if self.row_base is None else self.row_base.to(device)
        return BMP128(self.shape, self.bits.to(device), self.off.to(device), self.vals.to(device), row_base)

    def div_(self, divisor: float) -> None:
        """Divide all values in place: some models (RWKV) do so to a layer's weight when they first run."""
        self.vals.div_(divisor)

    def with_vals(self, vals: Tensor) -> "BMP128":
        """The same pattern with other values, of any dtype that the format takes."""
        return BMP128(self.shape, self.bits, self.off, vals, self.row_base)

    def tensors(self) -> dict[str, Tensor]:
        """What a file has to hold: shape (int64 [2]), bits, off, vals and, where needed, row_base."""
        stored = {"shape": torch.tensor(self.shape), "bits": self.bits, "off": self.off, "vals": self.vals}
        return stored if self.row_base is None else {**stored, "row_base": self.row_base}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor]) -> "BMP128":
        """The matrix that :meth:`tensors` describes. Raises ValueError for tensors that contradict each other.

        The check is complete, because the kernels read memory at the places these tensors name.
        """
        missing = {"shape", "bits", "off", "vals"} - set(stored)
        if missing:
            raise ValueError(f"BMP128 without {', '.join(sorted(missing))}")
        if stored["shape"].shape != (2,):
            raise ValueError(f"BMP128 shape is {tuple(stored['shape'].shape)}, expected two numbers")
        rows, columns = (int(size) for size in stored["shape"])
        matrix = cls((rows, columns), stored["bits"], stored["off"], stored["vals"], stored.get("row_base"))
        matrix._check()
        return matrix

    def _check(self) -> None:
        rows, columns = self.shape
        groups = -(-columns // GROUP)
        expected = [
            ("bits", self.bits, torch.uint32, (rows, groups, 4)),
            ("off", self.off, torch.int32, (rows, groups)),
        ]
        if self.row_base is not None:
            expected.append(("row_base", self.row_base, torch.int64, (rows,)))
        for name, tensor, dtype, shape in expected:
            if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
                raise ValueError(f"BMP128 {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
        if self.vals.dtype not in DTYPES or self.vals.dim() != 1 or self.vals.numel() < PADDING:
            raise ValueError(f"BMP128 vals is {self.vals.dtype} {tuple(self.vals.shape)}")
        counts = _group_counts(self.bits)
        if int(counts.sum()) != self.nnz:
            raise ValueError(f"BMP128 bits keep {int(counts.sum())} weights, vals holds {self.nnz}")
        if int(self.mask().sum()) != self.nnz:
            raise ValueError(f"BMP128 bits keep weights beyond column {columns}")
        start, row_base = _offsets(counts)
        if not torch.equal(start, self.off) or (row_base is None) != (self.row_base is None):
            raise ValueError("BMP128 off does not follow from bits")
        if row_base is not None and self.row_base is not None and not torch.equal(row_base, self.row_base):
            raise ValueError("BMP128 row_base does not follow from bits")


def byte_limit(sparsity: float, itemsize: int) -> float:
    """How often the bytes of a large matrix in BMP128 go into its dense ones: the most that a product can gain.

    itemsize: bytes of a value.
    """
    overhead = (16 + 4) / GROUP  # bits and off
    return itemsize / ((1 - sparsity) * itemsize + overhead)


def _group_counts(bits: Tensor) -> Tensor:
    """Kept weights per group: int64 [N, G]."""
    octets = bits.view(torch.uint8)
    octets = octets - ((octets >> 1) & 0x55)
    octets = (octets & 0x33) + ((octets >> 2) & 0x33)
    octets = (octets + (octets >> 4)) & 0x0F
    return octets.sum(dim=-1, dtype=torch.int64)


def _offsets(counts: Tensor) -> tuple[Tensor, Tensor | None]:
    """(off, row_base) for the counts [N, G] of kept weights."""
    ends = counts.flatten().cumsum(0).view_as(counts)
    starts = ends - counts
    if counts.numel() == 0 or int(ends[-1, -1]) < _OFFSET_LIMIT:
        return starts.to(torch.int32), None
    row_base = starts[:, 0].contiguous()
    return (starts - row_base[:, None]).to(torch.int32), row_base


def pack(weight: Tensor, mask: Tensor | None = None) -> BMP128:
    """Pack ``weight`` [N, K], float32 / bfloat16 / float16, keeping what ``mask`` (bool [N, K]) says.

    A kept value is stored bit for bit, whatever it is (zero, -0, NaN). Without a mask the weights that differ from 0
    are kept. Raises ValueError for arguments that do not fit.
    """
    if weight.dim() != 2 or weight.dtype not in DTYPES:
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; expected a float matrix")
    mask = weight != 0 if mask is None else mask
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool {tuple(weight.shape)}")
    rows, columns = weight.shape
    groups = -(-columns // GROUP)
    padded = torch.nn.functional.pad(mask, (0, groups * GROUP - columns)).view(rows, groups, 16, 8)
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    octets = (padded * powers).sum(dim=-1, dtype=torch.uint8)
    bits = octets.view(torch.uint32).view(rows, groups, 4)
    off, row_base = _offsets(_group_counts(bits))
    vals = torch.cat([weight.detach()[mask], weight.new_zeros(PADDING)])
    return BMP128((rows, columns), bits, off, vals, row_base)

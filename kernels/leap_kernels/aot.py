"""What compilers make of the Triton kernels, for GPUs that need not be at hand.

    python -m leap_kernels.aot            compare with the recorded table, exit code 1 if a kernel breaks a gate
    python -m leap_kernels.aot --record   record what the compilers make now in aot_table.json

Every variant in :mod:`leap_kernels.aot_variants` is compiled for every target; the table has a part for each version of
Triton. From the machine code are read:

    registers                 of a thread
    spills                    accesses to registers kept in memory; there must be none
    vector_loads              loads of 16 bytes in the counted code
    instructions_per_weight   executed by a thread for each weight of the dense matrix, for sparse matrices at half
                              density. Counted in the longest loop, or in the whole kernel where there is no loop

Triton keeps what it compiled in its cache; the first run takes a minute or two of one core.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from leap_kernels.aot_variants import VARIANTS, Variant

TABLE = Path(__file__).with_name("aot_table.json")
TARGETS = {f"sm_{version}": GPUTarget("cuda", version, 32) for version in (80, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
TOLERANCE = 0.10  # of the recorded instructions per weight

_CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)\s*([^;]*);")


@dataclass(frozen=True, slots=True)
class Code:
    """Read from one compiled kernel; see the module's text."""

    registers: int
    spills: int
    vector_loads: int
    instructions_per_weight: float


def compile_variant(variant: Variant, target: GPUTarget) -> "triton.compiler.CompiledKernel":
    constants = variant.constants | variant.backend_constants.get(target.backend, {})
    signature = {**variant.pointers, **variant.scalars, **dict.fromkeys(constants, "constexpr")}
    names = list(signature)
    # Triton marks arguments that 16 divides when a kernel is launched: allocations of torch do, and the sizes named.
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*variant.pointers, *variant.aligned)}
    source = ASTSource(variant.kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True, "num_warps": variant.warps})


def _longest_loop(jumps: Iterable[tuple[int, int]], end: int) -> tuple[int, int]:
    """First and last position of the longest loop among (position of a jump, where to); (0, end) without a loop."""
    loops = [(to, position) for position, to in jumps if to < position]
    return max(loops, key=lambda loop: loop[1] - loop[0], default=(0, end))


def _read_nvidia(cubin: bytes) -> tuple[int, int, list[str]]:
    """(registers, spills, the counted instructions)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "-sass", "-res-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert usage, listing[:500]
    lines = [(int(address, 16), name, operands) for address, name, operands in _SASS_LINE.findall(listing)]
    names = [name for _, name, _ in lines]
    spills = sum(name.startswith(("STL", "LDL")) for name in names) + int(usage[2])
    branches = [(at, re.search("0x([0-9a-f]+)", operands)) for at, name, operands in lines if name == "BRA"]
    jumps = [(at, int(to[1], 16)) for at, to in branches if to]
    end = max(at for at, name, _ in lines if name == "EXIT")
    first, last = _longest_loop(jumps, end)
    return int(usage[1]), spills, [name for at, name, _ in lines if first <= at <= last and name != "NOP"]


def _read_amd(assembly: str) -> tuple[int, int, list[str]]:
    """(vector registers, spills, the counted instructions)."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert found, key
        return int(found[1])

    body = assembly[: assembly.index("s_endpgm")].splitlines()
    labels: dict[str, int] = {}
    jumps: list[tuple[int, int]] = []
    names: list[str] = []
    for line in body:
        code = line.split(";")[0].strip()
        if label := re.fullmatch(r"(\.L\w+):", code):
            labels[label[1]] = len(names)
        elif re.match(r"[a-z]+_\w+", code):
            if (jump := re.match(r"s_c?branch\w*\s+(\.L\w+)", code)) and jump[1] in labels:
                jumps.append((len(names), labels[jump[1]]))
            names.append(code.split()[0])
    first, last = _longest_loop(jumps, len(names))
    spills = number("vgpr_spill_count") + number("sgpr_spill_count") + number("private_segment_fixed_size")
    return number("vgpr_count"), spills, names[first : last + 1]


_VECTOR_LOAD = re.compile(r"LDG(STS)?\.(.*\.)?128(\..*)?|(global|buffer)_load_dwordx4")


def read(variant_name: str, target_name: str) -> Code:
    """Compile one variant for one target and read its code."""
    variant, target = VARIANTS[variant_name], TARGETS[target_name]
    compiled = compile_variant(variant, target)
    is_nvidia = target.backend == "cuda"
    registers, spills, names = _read_nvidia(compiled.asm["cubin"]) if is_nvidia else _read_amd(compiled.asm["amdgcn"])
    threads = variant.warps * target.warp_size
    return Code(
        registers=registers,
        spills=spills,
        vector_loads=sum(_VECTOR_LOAD.fullmatch(name) is not None for name in names),
        instructions_per_weight=round(len(names) * threads / variant.weights, 2),
    )


def recorded() -> dict[str, dict[str, Code]] | None:
    """{variant: {target: code}} of the committed table for this version of Triton; None if it has none."""
    kernels = json.loads(TABLE.read_text()).get(triton.__version__)
    if kernels is None:
        return None
    return {name: {target: Code(**code) for target, code in codes.items()} for name, codes in kernels.items()}


def broken_gates(variant: Variant, target: GPUTarget, code: Code, record: Code | None) -> list[str]:
    """What this code breaks, in words; empty for code as it should be.

    record: the same from the committed table; None to leave out the comparison with it.
    """
    wanted = variant.vector_loads[target.backend]
    broken = []
    if code.spills:
        broken.append(f"{code.spills} spills")
    if code.registers > variant.max_registers:
        broken.append(f"{code.registers} registers, at most {variant.max_registers}")
    if code.vector_loads < wanted:
        broken.append(f"{code.vector_loads} loads of 16 bytes, at least {wanted}")
    if record is not None:
        now, then = code.instructions_per_weight, record.instructions_per_weight
        if abs(now - then) > TOLERANCE * then:
            broken.append(f"{now} instructions per weight, {then} recorded")
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the table instead of comparing with it")
    record = parser.parse_args().record
    table = {variant: {target: read(variant, target) for target in TARGETS} for variant in VARIANTS}
    old = table if record else recorded()
    if old is None:
        print(f"No record of Triton {triton.__version__}: only the gates that need none are checked.")
        old = {}
    failed = False
    for name, codes in table.items():
        for target, code in codes.items():
            broken = broken_gates(VARIANTS[name], TARGETS[target], code, old.get(name, {}).get(target))
            failed |= bool(broken)
            line = f"{name:28} {target:7} {code.instructions_per_weight:6.2f} instructions per weight, "
            line += f"{code.registers:3} registers, {code.vector_loads} loads of 16 bytes"
            print(line + "".join(f"; BROKEN: {gate}" for gate in broken))
    if record:
        kernels = {name: {target: asdict(code) for target, code in codes.items()} for name, codes in table.items()}
        content = json.loads(TABLE.read_text()) | {triton.__version__: kernels}
        TABLE.write_text(json.dumps(dict(sorted(content.items())), indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()

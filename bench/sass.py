"""Compile every kernel with no GPU and count what its inner loop costs: `python -m bench.sass`.

The inner loop is the shortest loop of the machine code that loads from global memory. Counted are its SASS
instructions (no NOP), times the threads of a block, over the elements of a block: lane-instructions an element.
With `--all`, every kernel is also compiled for sm_80, sm_100 and gfx942; registers and spills come from cuobjdump.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gem_kernels.backends.triton import catalogue

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_kernel(spec: catalogue.KernelSpec, target: str):
    """A catalogue entry -> triton's compiled kernel. Pointers count as 16-byte aligned, as torch allocates them."""
    constants = dict(spec.constexprs)
    if target == "gfx942":  # as launch.py does on AMD
        constants |= {name: False for name in ("PTX", "ORDERED") if name in constants}
    names = spec.kernel.arg_names
    signature = {n: spec.signature.get(n, "constexpr") for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n, t in signature.items() if t.startswith("*")}
    source = ASTSource(fn=spec.kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    if spec.maxnreg and target != "gfx942":
        options["maxnreg"] = spec.maxnreg
    return triton.compile(source, target=TARGETS[target], options=options)


def cuobjdump(compiled, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        return subprocess.run([BIN / "cuobjdump", *flags, f.name], capture_output=True, text=True, check=True).stdout


def resources(compiled) -> dict[str, int]:
    """Registers a thread and bytes of local memory (stack and spills; 0 means no spill)."""
    text = cuobjdump(compiled, "-res-usage")
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "local_bytes": int(re.search(r"LOCAL:(\d+)", text)[1]) + int(re.search(r"STACK:(\d+)", text)[1]),
    }


def amd_barriers(compiled) -> int:
    """Barriers in gfx942's code. They do not wait for stores to memory, so no kernel may need them for that."""
    return len(re.findall(r"^\s*s_barrier", compiled.asm["amdgcn"], re.M))


def machine_code(cubin: bytes) -> bytes:
    """The section .text of the one kernel of an ELF file."""
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    number, names = struct.unpack_from("<HH", cubin, 0x3C)
    sections = [struct.unpack_from("<IIQQQQ", cubin, offset + 64 * i) for i in range(number)]
    (code,) = (s for s in sections if cubin.startswith(b".text.", sections[names][4] + s[0]))
    return cubin[code[4] : code[4] + code[5]]


def instructions(compiled: list) -> list[list[tuple[int, str]]]:
    """(address, instruction) of each kernel's machine code for sm_90, in order.

    nvdisasm takes a third of a second to start, so all code goes through it in one piece: addresses count on.
    """
    codes = [machine_code(one.asm["cubin"]) for one in compiled]
    with tempfile.NamedTemporaryFile(suffix=".bin") as f:
        f.write(b"".join(codes))
        f.flush()
        command = [BIN / "nvdisasm", "--binary", "SM90", f.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.M)
    found = [(int(a, 16), text.strip()) for a, text in pattern.findall(text)]
    ends = list(itertools.accumulate(map(len, codes)))
    return [[x for x in found if end - len(code) <= x[0] < end] for code, end in zip(codes, ends)]


def loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The bodies of all backward branches, as lists of instructions."""
    found = []
    for address, text in code:
        branch = re.search(r"\bBRA(?:\.\w+)*\s+(?:\w+,\s*)?(?:`\(.*\)|0x([0-9a-f]+))", text)
        if branch and branch[1] and int(branch[1], 16) < address:
            begin = int(branch[1], 16)
            found.append([t for a, t in code if begin <= a <= address and "NOP" not in t])
    return found


def inner_loop(code: list[tuple[int, str]]) -> list[str]:
    """The loop that loads the most from global memory (the whole blocks); the shortest of those."""
    bodies = [b for b in loops(code) if any(re.search(r"\bLDG", t) for t in b)]
    most = max(sum("LDG" in t for t in b) for b in bodies)
    return min((b for b in bodies if sum("LDG" in t for t in b) == most), key=len)


def count(specs: list[catalogue.KernelSpec]) -> list[dict]:
    """The inner loop of each, for sm_90."""
    compiled = [compile_kernel(spec, "sm_90") for spec in specs]
    rows = []
    for spec, kernel, code in zip(specs, compiled, instructions(compiled), strict=True):
        body = inner_loop(code)
        memory = [t for t in body if re.search(r"\b(LDG|STG)", t)]
        threads = spec.num_warps * 32
        row = {
            "kernel": spec.name,
            "target": "sm_90",
            "block": spec.constexprs["BLOCK"],
            "warps": spec.num_warps,
            "instructions_per_element": len(body) * threads / spec.constexprs["BLOCK"],
            "global_accesses": len(memory),
            "all_16_bytes": all(".128" in t for t in memory),
        }
        rows.append(row | resources(kernel))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="compile every kernel for every target")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--dump", metavar="KERNEL", help="print the inner loop of this kernel (sm_90)")
    args = parser.parse_args(argv)
    specs = catalogue.kernels()
    if args.dump:
        spec = next(s for s in specs if s.name == args.dump)
        print("\n".join(inner_loop(instructions([compile_kernel(spec, "sm_90")])[0])))
        return
    rows = count([s for s in specs if s.streaming])
    if args.all:
        for spec in (s for s in specs if not s.counted_only):
            for target in TARGETS:
                compiled = compile_kernel(spec, target)
                row = {"kernel": spec.name, "target": target, "compiled": True}
                amd = target == "gfx942"
                rows.append(row | ({"barriers": amd_barriers(compiled)} if amd else resources(compiled)))
    for row in rows:
        print(json.dumps(row) if args.json else "  ".join(f"{k}={v}" for k, v in row.items()))


if __name__ == "__main__":
    sys.exit(main())

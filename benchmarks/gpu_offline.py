"""What GPUs would run: every Triton kernel compiled without one, and its instructions counted.

    python benchmarks/gpu_offline.py           compare with the committed table
    python benchmarks/gpu_offline.py --write   write the table

Triton's wheel has the compilers and disassemblers for NVIDIA's and AMD's chips. The table has, for
each kernel and chip: registers, shared memory, the instructions of the loop over chunks, those
among them that spill registers, and the products' instructions. `limits` says what a kernel has too
much of. The comparison fails where a kernel is worse than the table says.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_kernels import calls, constants_of, kernels_of, signature

TABLE = Path(__file__).parent.parent / "docs/reports/gpu-offline/kernels.json"
NVIDIA, AMD = (80, 89, 90, 100, 120), ("gfx942",)
# shared memory of a block, in bytes
MEMORY = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}
LONGER = 1.05  # a loop may be this much longer than in the table

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*)")
PRODUCTS = re.compile(r"HGMMA|UTC\w*MMA|HMMA|DMMA|IMMA")


def compile_kernel(name: str, label: str, target: int | str) -> dict[str, Any]:
    """One row of the table."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cumulant.kernels.triton import (
        device,
        gradients,
        groups,
        mean_gradients,
        means,
        mixed_gradients,
        mixed_outputs,
        outputs,
        step,
        sums,
    )

    modules = gradients, groups, mean_gradients, means, mixed_gradients, mixed_outputs
    kernel = next(vars(m)[name] for m in (*modules, outputs, step, sums) if name in vars(m))
    hip = isinstance(target, str)
    types, aligned = signature(kernel, label)
    constants = constants_of(label, list(types), target)
    attributes = {(list(types).index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
    chip = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", target, 32)
    row = {"kernel": name, "call": label, "target": str(target)}
    try:
        built = triton.compile(source, target=chip, options=device.COMPILED)
    except Exception as error:  # any failure of a compiler is a row
        return row | {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    row["shared"] = built.metadata.shared
    row["narrow"] = narrow_offsets(built.asm["ttir"])
    return row | (count_amd(built.asm["amdgcn"]) if hip else count_nvidia(built.asm["cubin"]))


def narrow_offsets(program: str) -> int:
    """How many offsets of pointers are 32-bit and no constant number of columns."""
    made = dict(re.findall(r"(%[\w.#]+) = ([\w.]+)", program))
    small = {"tt.make_range", "arith.constant"}

    def grows(name: str, depth: int = 0) -> bool:
        operation = made.get(name, "")
        followed = "tt.expand_dims", "tt.broadcast", "arith.addi", "arith.muli"
        if operation in followed and depth < 9:
            line = re.search(rf"{re.escape(name)} = [\w.]+ (.*?) :", program)
            parts = re.findall(r"%[\w.#]+", line[1]) if line else []
            return any(grows(part, depth + 1) for part in parts)
        return operation not in small

    offsets = re.findall(
        r"tt\.addptr %[\w.#]+, (%[\w.#]+) : [^,]+, (?:tensor<[\dx]*i32>|i32)", program
    )
    return sum(grows(name) for name in offsets)


def count_amd(assembly: str) -> dict[str, Any]:
    def number(pattern: str) -> int:
        found = re.search(pattern, assembly)
        return int(found[1]) if found else -1

    return {
        "registers": number(r"\.vgpr_count:\s+(\d+)"),
        "spilled": number(r"\.vgpr_spill_count:\s+(\d+)"),
        "products": dict(Counter(re.findall(r"\s(v_mfma\w+)", assembly))),
    }


def tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    found = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=False)
    return found.stdout + found.stderr


def count_nvidia(binary: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        assembly = tool("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    instructions, loops = find_loops(assembly)
    body = longest_loop(instructions, loops)
    return {
        "registers": int(registers[1]) if registers else -1,
        "instructions": len(instructions),
        "loop": len(body),
        "spills": sum(op.startswith(("LDL", "STL")) for op in body),
        "products": dict(Counter(op for op in body if PRODUCTS.match(op))),
    }


def find_loops(assembly: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions, and where the branches backwards begin and end."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[str, int]] = []
    for line in assembly.splitlines():
        if label := re.match(r"^(\.L_x?_?\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            if found[1].startswith("BRA") and (to := re.search(r"`\((\.L_x?_?\d+)\)", found[2])):
                branches.append((to[1], len(instructions)))
            instructions.append(found[1])
    return instructions, [(labels[a], b) for a, b in branches if a in labels and labels[a] < b]


def longest_loop(instructions: list[str], loops: list[tuple[int, int]]) -> list[str]:
    """The longest loop that is no part of a loop with as many products: a chunk's work."""
    bodies = [instructions[a : b + 1] for a, b in loops]
    return max(
        bodies, key=lambda x: (sum(bool(PRODUCTS.match(op)) for op in x), -len(x)), default=[]
    )


def build(which: list[tuple[str, str, int | str]], processes: int) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(processes) as pool:
        rows = list(pool.map(compile_kernel, *zip(*which)))
    return [row | {"limits": limits(row)} for row in rows]


def limits(row: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel, apart from how long it is."""
    if "error" in row:
        return [row["error"]]
    found = []
    target = int(row["target"]) if row["target"].isdigit() else row["target"]
    if row["shared"] > MEMORY[target] * 1024:
        found.append(f"{row['shared']} bytes of shared memory")
    if row["narrow"]:
        found.append(f"{row['narrow']} offsets of 32 bits")
    # ELiTA's chunks of 32 tokens have fewer rows than HGMMA, and their products are few
    is_small = row["call"].startswith("elita")
    if target == 90 and not is_small and any(op.startswith("HMMA") for op in row["products"]):
        found.append("products by HMMA, not by HGMMA")
    backwards = row["kernel"] == "query_sums" or "gradient" in row["kernel"]
    most = 0 if row["call"].startswith("elu") else 100 if backwards else 50
    spills = row.get("spills", row.get("spilled", 0))
    if spills > max(most, 0.02 * row.get("loop", 0)):
        found.append(f"{spills} instructions that spill, more than {most} and 2% of the loop")
    return found


def compare(rows: list[dict[str, Any]], table: list[dict[str, Any]]) -> list[str]:
    """How kernels are worse than in the table."""
    known = {(row["kernel"], row["call"], row["target"]): row for row in table}
    found = []
    for row in rows:
        name = row["kernel"], row["call"], row["target"]
        before = known.get(name)
        if before is None:
            found.append(f"{name}: not in the table")
            continue
        known_faults = {re.sub(r"\d+", "", why) for why in before["limits"]}
        new = [why for why in row["limits"] if re.sub(r"\d+", "", why) not in known_faults]
        found += [f"{name}: {why}" for why in new]
        if row.get("loop", 0) > LONGER * before.get("loop", 0):
            found.append(f"{name}: {row['loop']} instructions in a loop of {before['loop']}")
    return found


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        spills = row.get("spills", row.get("spilled", "-"))
        print(
            f"{row['kernel']:16}{row['call']:30}{row['target']:>8}"
            f"{row.get('registers', '-'):>5} registers{row.get('loop', '-'):>7} in the loop"
            f"{spills:>6} spill  {'; '.join(row['limits'])}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write these rows to the table")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="calls whose name begins with this")
    parser.add_argument("--kernel", default="", help="this kernel alone")
    parser.add_argument("--target", action="append", help="such as 90 or gfx942; may be repeated")
    options = parser.parse_args()
    if find_spec("triton") is None:
        print("Triton is not installed, so nothing was compiled")
        return
    targets = [int(t) if t.isdigit() else t for t in options.target or []] or [*NVIDIA, *AMD]
    which = [
        (kernel, label, target)
        for label in calls()
        for kernel in kernels_of(label)
        for target in targets
        if label.startswith(options.only) and options.kernel in kernel
    ]
    rows = build(which, options.processes)
    show(rows)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else []
    if options.write:
        new = {(row["kernel"], row["call"], row["target"]): row for row in rows}
        every = {(row["kernel"], row["call"], row["target"]): row for row in table} | new
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text("[\n" + ",\n".join(json.dumps(row) for row in every.values()) + "\n]\n")
        return
    worse = compare(rows, table)
    print(*worse, sep="\n")
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()

"""Compiles the Triton kernels for sm_80, sm_90 and sm_100, without a GPU, and reads what the assembler made of them;
for sm_89 those that take most of the 99 KB of shared memory that a program has there.

    python examples/benchmarks/kernels_aot.py            compiles all and writes results/kernels_aot.csv
    python examples/benchmarks/kernels_aot.py --check    compiles all and compares with that file
    python examples/benchmarks/kernels_aot.py --check --quick    a few of them, in less than a minute

Either fails where a kernel spills in a loop, takes more shared memory than a program may, misses the tensor cores, has
lost its loop (Triton compiles products that it cannot do on sm_100 to a trap), or where the decode loop takes more
instructions an element than `BUDGET`; but for those in `EXCUSED`, which says why. What is compiled, and the budget, are
in `kernels_aot_cases.py`.

The last columns are a bound, not a measurement: the share of an H200's bandwidth that the loop can use before it is the
instructions that limit it (132 multiprocessors at 1.755 GHz with 128 lanes; 4.3 TB/s, what a copy reaches; entries are
codes and a float16 scale). Elements are numbers of keys and values of one KV head, decoded once for its query group.
"""

from __future__ import annotations

import argparse
import collections
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# the interpreter replaces the kernels when this is set as they are imported
os.environ["TRITON_INTERPRET"] = "0"

from common import RESULTS
from kernels_aot_cases import Case, cases
from roofline import BANDWIDTH, CLOCK, MULTIPROCESSORS

SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# kernel and target -> why it may be as it is
EXCUSED = {
    (
        "code_attention 4 bits, cubic, head_dim 128, 8 query rows",
        "sm_80",
    ): "two accesses in a loop of 2000 instructions",
    ("gated_retention fp32, heads of 128 and 128, outputs", "sm_90"): "six accesses in a loop of 1800 instructions",
    # heads of 256, also for their gradient in 16 bits; on the tensor cores there are more accesses, or none but a trap
    (
        "gated_retention fp32, heads of 256 and 256, outputs",
        "sm_89",
    ): "242 accesses in a loop of 3400 instructions",
    (
        "gated_retention fp32, heads of 256 and 256, outputs",
        "sm_90",
    ): "232 accesses in a loop of 3500 instructions",
    (
        "gated_retention fp32, heads of 256 and 256, outputs",
        "sm_100",
    ): "395 accesses in a loop of 3100 instructions",
}
# what --quick compiles
QUICK = (
    "code_attention 3 bits, equal steps, head_dim 128, 8 query rows sm_90",
    "code_attention 4 bits, cubic, head_dim 128, 8 query rows sm_90",
    "encode_entries bf16, 4+4 bits, head_dim 128 sm_90",
)
TOLERANCE = 0.03


@dataclass
class Facts:
    """What became of it."""

    registers: int
    instructions: int
    spilled: int
    shared: int
    tensor_cores: bool
    loops: list[collections.Counter] = field(default_factory=list)

    @property
    def main_loop(self) -> collections.Counter:
        return max(self.loops, key=lambda loop: loop.total(), default=collections.Counter())

    def run(self, turns: float) -> float:
        """Instructions that a warp runs: those of the main loop, or of all the program when its loops take `turns`."""
        if not turns:
            return self.main_loop.total()
        return self.instructions + (turns - 1) * sum(loop.total() for loop in self.loops)


def compiled(case: Case, architecture: int) -> Facts:
    """Compiles a case; pointers and strides are taken to be multiples of 16, as torch allocates them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    strides = tuple(f"{name}_{axis}" for name in "qkv" for axis in ("run", "row", "head", "token"))
    aligned = [name for name, kind in case.types.items() if kind[0] == "*" or name in strides]
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.most_registers:
        options["maxnreg"] = case.most_registers
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(made.asm["cubin"])
        ptx.write_text(made.asm["ptx"])
        usage = _run(tools / "cuobjdump", "-res-usage", cubin)
        assembly = _run(tools / "nvdisasm", "-c", cubin)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    loops = list(loops_of(assembly))
    instructions = [name for name, operands in _instructions(assembly) if operands]
    spilled = sum(name.startswith(("LDL", "STL")) for name in instructions)
    tensor_cores = any(name.startswith(("HMMA", "HGMMA", "UTCHMMA")) for name in instructions)
    return Facts(registers, len(instructions), spilled, made.metadata.shared, tensor_cores, loops)


def _run(tool: Path, *arguments: Any) -> str:
    return subprocess.run([str(tool), *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def _instructions(assembly: str) -> Iterator[tuple[str, str]]:
    """(name, operands) of every instruction; a label has no operands."""
    for line in assembly.splitlines():
        label = re.match(r"\s*(\.L_x?_?\d+):", line)
        found = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*?);", line)
        if label:
            yield label[1], ""
        elif found:
            yield found[1], found[2] or " "


def loops_of(assembly: str) -> Iterator[collections.Counter]:
    """The instructions of every innermost loop: a jump backwards that no other one lies in."""
    lines, labels = [], {}
    for name, operands in _instructions(assembly):
        if operands:
            lines.append((name, operands))
        else:
            labels[name] = len(lines)
    spans = []
    for place, (name, operands) in enumerate(lines):
        target = re.search(r"(\.L_x?_?\d+)", operands) if name.startswith("BRA") else None
        if target and labels.get(target[1], place + 1) < place:
            spans.append((labels[target[1]], place))
    for first, last in spans:
        if not any(span != (first, last) and first <= span[0] and span[1] <= last for span in spans):
            yield collections.Counter(name for name, _ in lines[first : last + 1])


def row_of(case: Case, architecture: int) -> dict[str, Any]:
    """A line of the table, with what is wrong in its last column."""
    facts = compiled(case, architecture)
    loop = facts.main_loop
    spilled = sum(count for one in facts.loops for name, count in one.items() if name.startswith(("LDL", "STL")))
    each = facts.run(case.turns) / case.elements if case.elements else None
    limit = None
    if each and case.bytes_each:
        limit = MULTIPROCESSORS * 128 * CLOCK / each * case.bytes_each / BANDWIDTH
    wrong = [
        what
        for what, true in (
            ("spills in a loop", spilled > 0),
            ("too much shared memory", facts.shared > SHARED_LIMIT[architecture]),
            ("over the budget of instructions", case.budget is not None and each is not None and each > case.budget),
            ("no tensor cores", case.tensor_cores and not facts.tensor_cores),
            ("no loop", case.elements > 0 and not case.turns and not facts.loops),
            ("converts integers", case.elements > 0 and any(name.startswith("I2F") for name in loop)),
        )
        if true
    ]
    return {
        "kernel": case.name,
        "target": f"sm_{architecture}",
        "registers": facts.registers,
        "spills": facts.spilled,
        "spills in loops": spilled,
        "shared bytes": facts.shared,
        "warps": case.num_warps,
        "instructions an element": None if each is None else round(each, 2),
        "budget": case.budget,
        "bytes an element": None if not case.bytes_each else round(case.bytes_each, 4),
        "bandwidth before instructions limit (H200)": None if limit is None else f"{limit:.0%}",
        "wrong": "; ".join(wrong),
        "excused": EXCUSED.get((case.name, f"sm_{architecture}"), "") if wrong else "",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed table instead of writing it")
    parser.add_argument("--quick", action="store_true", help="only the few that a test compiles")
    parser.add_argument("--only", default="", help="only kernels and targets that hold this text")
    arguments = parser.parse_args()
    import triton

    rows = []
    for case in cases():
        for architecture in case.architectures:
            name = f"{case.name} sm_{architecture}"
            if arguments.only in name and (not arguments.quick or name in QUICK):
                rows.append(row_of(case, architecture))
                print(*(f"{value}" for value in rows[-1].values()), sep=" | ", flush=True)
    path = RESULTS / "kernels_aot.csv"
    failures = [
        f"{row['kernel']} on {row['target']}: {row['wrong']}" for row in rows if row["wrong"] and not row["excused"]
    ]
    if arguments.check:
        failures += compare(rows, path, triton.__version__)
    else:
        from common import write_results

        write_results("kernels_aot", [row | {"triton": triton.__version__} for row in rows])
    print(*failures, f"{len(rows)} compilations, {len(failures)} failures", sep="\n")
    return int(bool(failures))


def compare(rows: list[dict[str, Any]], path: Path, version: str) -> list[str]:
    """What the committed table says otherwise; another version of Triton may compile otherwise."""
    if not path.exists():
        print(f"{path} is not there; nothing to compare with")
        return []
    with path.open(newline="") as file:
        table = {(row["kernel"], row["target"]): row for row in csv.DictReader(file)}
    missing = [f"{row['kernel']} on {row['target']} is not in {path}; write it anew" for row in rows
               if (row["kernel"], row["target"]) not in table]  # fmt: skip
    if missing or any(row["triton"] != version for row in table.values()):
        return missing
    worse = []
    for row in rows:
        old = table[row["kernel"], row["target"]]["instructions an element"]
        now = row["instructions an element"]
        if now and now > float(old) * (1 + TOLERANCE):
            worse.append(f"{row['kernel']} on {row['target']}: {now} instructions an element, {old} in {path.name}")
    return worse


if __name__ == "__main__":
    sys.exit(main())

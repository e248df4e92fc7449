"""Kernels compiled for GPUs that are not here, in processes that interpret nothing."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.alone import run_alone

# bytes of shared memory that a program may have: of sm_89, which runs what is compiled for sm_80 and has less; of
# sm_90; of gfx942
SHARED = {"sm_80": 99 << 10, "sm_90a": 227 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True)
class Job:
    """One kernel as one launch specializes it.

    Args:
        module: in `lowrank_optim.kernels`.
        kernel: its name there.
        types: of each argument that is no constant: "*bf16", "i32", "fp32".
        constants: values of the others; arguments that arrive as 1 are among them.
        unaligned: arguments that 16 need not divide; it divides all other pointers and integers.
        options: `num_warps` and `num_stages`.
        targets: the GPUs.
        counted: whether the instructions of NVIDIA's are counted, which takes a disassembler.
    """

    module: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    unaligned: tuple[str, ...] = ()
    options: dict[str, int] = field(default_factory=dict)
    targets: tuple[str, ...] = tuple(SHARED)
    counted: bool = False


@dataclass(frozen=True)
class Built:
    """What a compiler made of a job."""

    # each of what the tools count as spilled, in their own words
    spilled: dict[str, int]
    # registers of a thread; None where the tools do not say
    registers: int | None
    # bytes of shared memory
    shared: int
    # the assembly: PTX or AMD's
    text: str
    # of a thread, each counted once; None where nobody has
    instructions: int | None = None


_CODE = """
import importlib, json, pathlib, re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90a": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
folder = pathlib.Path(sys.argv[1])
found = {}
for name, job in json.loads((folder / "jobs.json").read_text()).items():
    kernel = getattr(importlib.import_module("lowrank_optim.kernels." + job["module"]), job["kernel"])
    types = {arg: "constexpr" if arg in job["constants"] else job["types"][arg] for arg in kernel.arg_names}
    aligned = [arg for arg, kind in types.items() if kind[0] in "*i" and arg not in job["unaligned"]]
    hints = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names) if arg in aligned}
    for target_name in job["targets"]:
        target = TARGETS[target_name]
        source = ASTSource(kernel, types, constexprs=job["constants"], attrs=hints)
        built = triton.compile(source, target=target, options=job["options"])
        if target.backend == "cuda":
            cubin = folder / "built.cubin"
            cubin.write_bytes(built.asm["cubin"])
            usage = subprocess.check_output([tools / "cuobjdump", "-res-usage", cubin], text=True)
            keys, text = "(STACK|LOCAL):", built.asm["ptx"]
            registers = int(re.search(r"REG:(\\d+)", usage)[1])
        else:
            usage = text = built.asm["amdgcn"]
            keys = r"\\.(vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\\s*"
            registers = None
        spilled = {key: int(number) for key, number in re.findall(keys + r"(\\d+)", usage)}
        instructions = None
        if job["counted"] and target.backend == "cuda":
            lines = subprocess.check_output([tools / "cuobjdump", "-sass", cubin], text=True)
            named = re.findall(r"/\\*[0-9a-f]{4,5}\\*/\\s+(?:@!?U?P\\d\\s+)?([A-Z]\\w*)", lines)
            instructions = sum(name != "NOP" for name in named)
        numbers = {"spilled": spilled, "registers": registers, "shared": built.metadata.shared, "text": text}
        numbers["instructions"] = instructions
        found[f"{target_name} {name}"] = numbers
(folder / "built.json").write_text(json.dumps(found))
"""


def compiled(jobs: dict[str, Job], folder: Path) -> dict[str, Built]:
    """Compile each job for its targets, on two cores; keys of the result are "target name"."""
    names = list(jobs)
    halves = [{name: asdict(jobs[name]) for name in names[start::2]} for start in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(_compile, halves, (folder / "first", folder / "second")))
    return {name: Built(**numbers) for part in found for name, numbers in part.items()}


def _compile(jobs: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_alone(_CODE, str(folder), TRITON_CACHE_DIR=str(folder / "cache"))
    numbers: dict[str, dict[str, Any]] = json.loads((folder / "built.json").read_text())
    return numbers


def assert_fits(name: str, built: Built, *, scalars: bool = False) -> None:
    """Nothing is spilled and shared memory is within the target's; `scalars` of AMD's may go to vector lanes."""
    target = name.split()[0]
    spilled = dict(built.spilled)
    assert len(spilled) == (3 if target == "gfx942" else 2), name
    if scalars:
        spilled.pop("sgpr_spill_count", None)
    assert not any(spilled.values()), (name, spilled)
    assert 0 <= built.shared <= SHARED[target], (name, built.shared)

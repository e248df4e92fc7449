"""What a step on a GPU costs the host, where there is no GPU: `python -m experiments.bench_host`.

A short step waits for the host, which takes more time to say what is to be done than a device takes to do it. This is
that time: the optimizers' own Python, Triton's way from a call to a launch, and torch's from a call to a kernel. Triton
compiles for an H200 and launches through its own driver, over a CUDA library whose functions return at once; tensors
are a CPU's that say they are a GPU's; products of matrices, which a device would only be handed, return tensors with
nothing in them. What a real driver and cuBLAS add to each launch, some microseconds, is missing.

Sides and ranks are a 64th of LLaMA-7B's, and `chunk_bytes` a 4096th, so as many matrices are stepped at once as there.
"""

import argparse
import atexit
import contextlib
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.machine import command, machine
from lowrank_optim import DCTAdamW, GaLoreAdamW

Figures = dict[str, Any]

# one layer: attention, and the matrices around the activation
_SHAPES = [(64, 64)] * 4 + [(172, 64)] * 2 + [(64, 172)]
_LAYERS, _SHRINK = 32, 64
# of an H200
_H200 = {"multi_processor_count": 132, "major": 9, "minor": 0, "total_memory": 150_110_011_392}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "GaLoreAdamW r=256": lambda p: GaLoreAdamW(p, rank=256 // _SHRINK, basis="subspace", update_proj_gap=1 << 20),
    "GaLoreAdamW r=1024": lambda p: GaLoreAdamW(p, rank=1024 // _SHRINK, basis="subspace", update_proj_gap=1 << 20),
    "DCTAdamW r=256": lambda p: DCTAdamW(p, rank=256 // _SHRINK),
    "DCTAdamW r=1024": lambda p: DCTAdamW(p, rank=1024 // _SHRINK),
}

# what Triton's driver calls, and how: all succeed, and what is asked for is there
_DRIVER = r"""
#include "cuda.h"
static int thing;
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)&thing; return 0; }
CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
CUresult cuCtxGetLimit(size_t *v, CUlimit l) { *v = 0; return 0; }
CUresult cuCtxSetLimit(CUlimit l, size_t v) { return 0; }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = 0; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)&thing; return 0; }
CUresult cuDriverGetVersion(int *v) { *v = 13000; return 0; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
    *v = a == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448
       : a == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132
       : a == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32
       : a == CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK ? 65536 : 1024;
    return 0;
}
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
    *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
    return 0;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return 0; }
CUresult cuGetErrorString(CUresult e, const char **s) { *s = "none"; return 0; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **a, void **e) { return 0; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = (CUmodule)&thing; return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) { *f = (CUfunction)&thing; return 0; }
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)v = p; return 0; }
"""


def pretend() -> None:
    """Let torch and Triton take this process's CPU for a GPU whose launches do nothing. There is no way back.

    Raises:
        RuntimeError: where there is a GPU, or kernels are interpreted in this process.
    """
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("this needs a process without a GPU and without TRITON_INTERPRET; see bench.py for a GPU")
    import triton
    from triton.backends.nvidia import driver

    folder = Path(tempfile.mkdtemp(prefix="no_gpu_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "driver.c").write_text(_DRIVER)
    library = folder / "libcuda.so.1"
    headers = Path(driver.__file__).parent / "include"
    flags = ["-shared", "-fPIC", "-O2", "-w", f"-I{headers}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *flags, str(folder / "driver.c"), "-o", str(library)], check=True)
    (folder / "libcuda.so").symlink_to(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    # found by its name, whatever loads it
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    h200 = SimpleNamespace(**_H200)
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.get_device_properties = lambda *_: h200
    cuda.get_device_capability = lambda *_: (h200.major, h200.minor)
    cuda.current_device = lambda: 0
    cuda.device = lambda *_: contextlib.nullcontext()
    active: Any = driver.CudaDriver()
    active.get_current_device, active.get_current_stream = lambda: 0, lambda *_: 0
    triton.runtime.driver.set_active(active)

    def product(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty((*a.shape[:-1], b.shape[-1]), dtype=out_dtype or a.dtype)

    everywhere: Any = torch
    everywhere.mm = product
    tensor: Any = Tensor
    tensor.is_cuda = property(lambda _: True)
    tensor.__matmul__ = product
    tensor.addmm_ = lambda self, *_, **__: self
    for kind in (GaLoreAdamW, DCTAdamW):
        kind.chunk_bytes //= _SHRINK**2


def host_us(name: str, rounds: int, layers: int = _LAYERS) -> Figures:
    """Return microseconds of a step for each matrix, after `pretend`."""
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for _ in range(layers) for shape in _SHAPES]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = OPTIMIZERS[name](params)
    times = []
    # the first compile
    for _ in range(3 + rounds):
        start = time.perf_counter()
        optimizer.step()
        times.append(1e6 * (time.perf_counter() - start) / len(params))
    times = times[3:]
    return {"optimizer": name, "median_us": round(statistics.median(times), 1), "min_us": round(min(times), 1)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write a file where one is named."""
    parser = argparse.ArgumentParser(description="Host time of a step on a GPU, for each matrix, without a GPU.")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--layers", type=int, default=_LAYERS)
    parser.add_argument("--only", choices=OPTIMIZERS, nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    facts = machine()
    pretend()
    rows = [host_us(name, args.rounds, args.layers) for name in args.only]
    for row in rows:
        print(f"{row['optimizer']:20} {row['median_us']:7.1f} µs a matrix (least {row['min_us']:.1f})")
    if args.out is not None:
        line = command("experiments.bench_host", sys.argv[1:] if argv is None else argv)
        document = {"command": line, "machine": facts, "matrices": len(_SHAPES) * args.layers, "host": rows}
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""`mm bench attention --suite compile`: what the attention kernels take of a GPU, without one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mm.errors import InputError

from ..common.machine import cores
from .attention_workloads import COMPILED, DECODED, EXACT, Workload
from .report import Case

MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # matrix instructions; 16 rows of a decoding step take HMMA
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may use
NONE_SPILLS = ("forward", "forward_hopper", "decode", "reach_keys", "reach_queries")
SOME_SPILL = 32  # bytes that others may
Binary = tuple[str, str, Any]  # kernel, tile, what Triton made of it


@dataclass(frozen=True)
class Compiled:
    """A kernel as machine code. spilled: bytes of stack a thread; shared: bytes a program; fetches: loads of whole
    tiles by the tensor memory accelerator."""

    kernel: str
    tile: str
    registers: int
    spilled: int
    shared: int
    matrix: int
    fetches: int

    @property
    def allowed(self) -> int:
        return 0 if self.kernel in NONE_SPILLS else SOME_SPILL


@contextmanager
def elsewhere(arch: int) -> Iterator[list[Binary]]:
    """Inside, kernels are compiled for compute capability arch / 10 instead of started; yields what was compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from mm.kernels import triton_launch, triton_plan

    class Elsewhere:
        """As much of a driver as the compiler asks for."""

        def get_current_device(self) -> int:
            return 1000 + arch

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

    compiled: list[Binary] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        plan = options.get("plan")
        binary = kernel.warmup(*args, grid=grid, **options)
        tile = f"{plan.rows} x {plan.keys}, {binary.metadata.num_warps} warps" if plan else "row"
        compiled.append((kernel.fn.__name__, tile, binary))

    real = triton_launch.launch, triton_plan.shared_memory
    triton_launch.launch, triton_plan.shared_memory = compile_only, lambda device: SHARED[arch]
    driver.set_active(Elsewhere())
    try:
        yield compiled
    finally:
        triton_launch.launch, triton_plan.shared_memory = real
        driver.set_active(None)  # the real one again, if it is ever asked for


def inspect(kernel: str, tile: str, binary: Any, arch: int) -> Compiled:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = output(tools / "nvdisasm", "-c", file.name)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    matrix = len(re.findall(rf"\b({'HMMA' if kernel == 'decode' else MATRIX[arch]})\b", code))
    return Compiled(kernel, tile, found["REG"], found["STACK"], binary.metadata.shared, matrix, code.count("UTMALDG"))


def output(*command: Any) -> str:
    return subprocess.run([str(x) for x in command], check=True, capture_output=True, text=True).stdout


def compile_all(workload: Workload, dtype: torch.dtype, arch: int) -> list[Compiled]:
    """Every kernel that a workload starts."""
    return [inspect(*binary, arch) for binary in binaries(workload, dtype, arch)]


def binaries(workload: Workload, dtype: torch.dtype, arch: int) -> list[Binary]:
    from mm.kernels import triton_launch, triton_plan
    from mm.kernels.operator import kernel_args

    from .attention_hopper import forward_on_hopper, suits_hopper

    meta = torch.device("meta")
    call = triton_plan.KernelArgs(*kernel_args(*workload.tensors(meta, dtype), workload.options(meta)))
    with elsewhere(arch) as compiled, torch.no_grad():
        out, lse = triton_launch.attention(call)
        if arch == 90 and suits_hopper(call):
            forward_on_hopper(call, out, lse)
        if workload.trained:
            triton_launch.gradients(call, torch.empty_like(out), out, lse)
    return compiled


def suite() -> dict[str, tuple[Workload, torch.dtype]]:
    bf16 = {name: (workload, torch.bfloat16) for name, workload in {**COMPILED, **DECODED}.items()}
    return {**bf16, **{f"{name}, float32": (bf16[name][0], torch.float32) for name in EXACT}}


def measure(arch: int) -> list[Case]:
    if arch not in MATRIX:
        raise InputError(f"--arch should be one of {', '.join(map(str, MATRIX))}, not {arch}")
    given = suite()
    found = in_processes(compile_all, [(*asked, arch) for asked in given.values()])
    return [case for name, kernels in zip(given, found, strict=True) for one in kernels
            for case in cases(f"sm_{arch}, {name}: {one.kernel} ({one.tile})", one)]


def in_processes(compiling: Callable[..., Any], jobs: list[tuple[Workload, torch.dtype, int]]) -> list[Any]:
    """As many at once as there are cores; Triton keeps what it compiled on disk. Raises BrokenProcessPool if the
    compiler ends a process."""
    if cores() == 1:
        return [compiling(*job) for job in jobs]
    with ProcessPoolExecutor(min(cores(), 16, len(jobs)), get_context("spawn")) as pool:
        return list(pool.map(compiling, *zip(*jobs, strict=True)))


def try_compiling(*job: Any) -> None:
    """Into Triton's cache; what fails here fails again where it is run, and is told there."""
    with suppress(Exception):
        binaries(*job)


def cases(name: str, found: Compiled) -> list[Case]:
    """The lines of one kernel."""
    return [Case(case=f"{name}, spilled", ours=found.spilled, peer=found.allowed, unit="B a thread",
                 ratio=(found.allowed + 1) / (found.spilled + 1), at_least=1.0),
            Case(case=f"{name}, registers", ours=found.registers, unit="a thread"),
            Case(case=f"{name}, shared memory", ours=found.shared / 1024, unit="KiB"),
            Case(case=f"{name}, matrix instructions", ours=found.matrix, unit="in the code"),
            Case(case=f"{name}, tiles fetched at once", ours=found.fetches, unit="in the code")]

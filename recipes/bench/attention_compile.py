"""`mm bench attention --suite compile`: what the attention kernels take of a GPU, without one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.errors import InputError

from .report import Case

MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # matrix instructions; 16 rows of a decoding step take HMMA
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may use
SPILLS = {"forward": 0, "decode": 0, "reach_keys": 0, "reach_queries": 0}  # bytes that are allowed; others 32
CAUSAL = dict(right=0)
DOCUMENTS = dict(right=0, group=4, regular=False, documents=True)
FORWARD: dict[str, dict[str, Any]] = {
    "head 64, full": dict(width=64), "head 64, causal": dict(width=64, **CAUSAL),
    "head 80, causal": dict(width=80, **CAUSAL), "head 96, causal": dict(width=96, **CAUSAL),
    "head 128, full": dict(), "head 128, causal": CAUSAL, "head 256, causal": dict(width=256, **CAUSAL),
    "head 192/128 (MLA), causal": dict(width=192, value_width=128, **CAUSAL),
    "head 128, window 1024, GQA 4:1": dict(left=1023, right=0, group=4),
    "head 64, documents, GQA 4:1": dict(width=64, **DOCUMENTS), "head 128, documents, GQA 4:1": DOCUMENTS,
    "head 192/128 (MLA), documents": dict(width=192, value_width=128, **DOCUMENTS),
    "head 128, softcap, sinks, causal": dict(softcap=30.0, sinks=True, **CAUSAL),
    "head 64, T5 bias": dict(width=64, bias="buckets"), "head 128, T5 bias": dict(bias="buckets"),
    "head 64, ALiBi": dict(width=64, bias="slopes", **CAUSAL), "head 64, dropout": dict(width=64, dropout=0.1),
    "head 64, rotation on load (ViT)": dict(width=64, length=197, turn=64, batch=256),
    "head 128, rotation on load": dict(length=512, turn=128, **CAUSAL),
    "head 128, float32, causal": dict(dtype=torch.float32, **CAUSAL),
}
DECODE = {"head 64, decode, GQA 8:1": 64, "head 128, decode, GQA 8:1": 128, "head 256, decode, GQA 8:1": 256}


@dataclass(frozen=True)
class Compiled:
    """A kernel as machine code. spilled: bytes of stack a thread; shared: bytes a program."""

    kernel: str
    tile: str
    registers: int
    spilled: int
    shared: int
    matrix: int

    @property
    def allowed(self) -> int:
        return SPILLS.get(self.kernel, 32)


@contextmanager
def elsewhere(arch: int) -> Iterator[list[Compiled]]:
    """Inside, kernels are compiled for compute capability arch / 10 instead of started; yields what was compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from mm.kernels import triton_launch

    class Elsewhere:
        """As much of a driver as the compiler asks for."""

        def get_current_device(self) -> int:
            return 1000 + arch

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

    compiled: list[Compiled] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        plan = options.get("plan")
        tile = f"{plan.rows} x {plan.keys}, {options['num_warps']} warps" if plan else "row"
        binary = kernel.warmup(*args, grid=grid, **options)
        compiled.append(inspect(kernel.fn.__name__, tile, binary, arch))

    real = triton_launch.launch, triton_launch.shared_memory
    triton_launch.launch, triton_launch.shared_memory = compile_only, lambda device: SHARED[arch]
    driver.set_active(Elsewhere())
    try:
        yield compiled
    finally:
        triton_launch.launch, triton_launch.shared_memory = real
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
    return Compiled(kernel, tile, found["REG"], found["STACK"], binary.metadata.shared,
                    len(re.findall(rf"\b({'HMMA' if kernel == 'decode' else MATRIX[arch]})\b", code)))


def output(*command: Any) -> str:
    return subprocess.run([str(x) for x in command], check=True, capture_output=True, text=True).stdout


def call(*, width: int = 128, value_width: int | None = None, batch: int = 4, kv: int = 8, group: int = 1,
         length: int = 8192, keys: int | None = None, left: int = -1, right: int = -1, chunk: int = -1,
         regular: bool = True, documents: bool = False, turn: int = 0, k_turn: bool = True, sinks: bool = False,
         softcap: float = 0.0, bias: str = "", dropout: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A call of the kernels on tensors without memory."""
    from mm.kernels.triton_launch import Call

    keys, heads = keys or length, kv * group

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def line(there: bool, count: int) -> Tensor | None:
        return empty(batch, count, dtype=torch.int64) if there else None

    weight = {"": None, "buckets": empty(32, heads), "slopes": empty(heads)}[bias]
    angles = [empty(batch, 1, count, turn, dtype=torch.float32) if turn and there else None
              for count, there in ((length, True), (length, True), (keys, k_turn), (keys, k_turn))]
    return Call(empty(batch, heads, length, width), empty(batch, kv, keys, width),
                empty(batch, kv, keys, value_width or width), empty(heads) if sinks else None, weight,
                empty(257, dtype=torch.int32) if bias == "buckets" else None,
                empty(1, dtype=torch.int64) if dropout else None, line(not regular, length), line(not regular, keys),
                line(documents, length), line(documents, keys), None, *angles, False, regular, left, right, chunk,
                width ** -0.5, softcap, dropout)


def compile_all(what: Any, arch: int, backward: bool) -> list[Compiled]:
    """Every kernel that a call starts."""
    from mm.kernels import triton_launch

    with elsewhere(arch) as compiled:
        out, lse = triton_launch.attention(what)
        if backward:
            triton_launch.gradients(what, torch.empty_like(out), out, lse)
    return compiled


def decoding(width: int) -> Any:
    return call(width=width, batch=1, length=1, keys=32768, group=8, right=0, regular=False, turn=width, k_turn=False)


def measure(arch: int) -> list[Case]:
    if arch not in MATRIX:
        raise InputError(f"--arch should be one of {', '.join(map(str, MATRIX))}, not {arch}")
    calls = [(name, call(**given), True) for name, given in FORWARD.items()]
    calls += [(name, decoding(width), False) for name, width in DECODE.items()]
    return [case for name, what, backward in calls for found in compile_all(what, arch, backward)
            for case in cases(f"sm_{arch}, {name}: {found.kernel} ({found.tile})", found,
                              what.q.dtype != torch.float32)]


def cases(name: str, found: Compiled, exact: bool) -> list[Case]:
    """The lines of one kernel. exact: whether spills are held to what is allowed; without matrix instructions
    (float32) they are only told."""
    spilled = Case(case=f"{name}, spilled", ours=found.spilled, peer=found.allowed, unit="B a thread",
                   ratio=(found.allowed + 1) / (found.spilled + 1), at_least=1.0 if exact else None)
    return [spilled, Case(case=f"{name}, registers", ours=found.registers, unit="a thread"),
            Case(case=f"{name}, shared memory", ours=found.shared / 1024, unit="KiB"),
            Case(case=f"{name}, matrix instructions", ours=found.matrix, unit="in the code")]

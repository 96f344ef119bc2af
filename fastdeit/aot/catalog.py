"""Every kernel configuration that can run on a GPU, and what the compiler makes of it, without a GPU.

A kernel file lists its configurations in `aot_configs(arch)`. Each is compiled ahead of time for an architecture; registers,
spills, shared memory and the instruction stream are read from the compiled binary with the tools that are part of Triton.
"""

import functools
import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import tempfile
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import DependenciesFinder, JITFunction

from fastdeit.aot import instruction_stream, sass
from fastdeit.aot.execution import Execution
from fastdeit.aot.instruction_stream import InstructionStream
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.architecture import LIMITS, Limits

# modules of fastdeit.kernels that have a `aot_configs(arch)`
KERNEL_FILES = (
    "augment.apply",
    "augment.tables",
    "norm.layer_norm",
    "runtime.column_sums",
    "attention.forward",
    "attention.backward",
    "loss.distillation_cross_entropy",
    "gemm.folded_weights",
    "gemm.forward",
    "gemm.backward",
    "mlp.activation",
    "embedding.patch_embedding",
    "norm.residual_branch",
    "gemm.fused_mlp",
    "quantization.layer_norm_quantize",
    "quantization.rescale",
)
ARCHITECTURES = (80, 89, 90, 100)  # what the configurations are compiled for; others run the nearest one's choices

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_ALIGNMENT = 16  # bytes; launchers pass such pointers or take another path
_OPTIONAL = ("_ptr", "_desc")  # endings of arguments that may be absent


@dataclass(frozen=True)
class Resources:
    """What one compiled configuration needs of a streaming multiprocessor."""

    registers: int  # per thread
    spilled_bytes: int  # per thread, of local memory that loads and stores reach
    shared_bytes: int  # per block
    blocks_per_sm: int  # resident at once, by registers, shared memory, tensor memory and threads
    matrix_instructions: dict[str, int] = field(default_factory=dict)  # mnemonic -> occurrences in the binary
    scalar_products: int = 0  # `tl.dot`s that the compiler turned into multiply-adds without matrix instructions
    stream: InstructionStream | None = None  # None for figures on record that were made before it was read
    execution: Execution | None = (
        None  # from the record: what executing the PTX on a CPU counted, where it can be executed
    )

    @property
    def can_be_executed(self) -> bool:
        """Whether fastdeit.testing.ptx knows its instructions: it has no tensor memory."""
        return not any(name.startswith("UTC") for name in self.matrix_instructions)


def aot_configs(arch: int, kernel_files: tuple[str, ...] = KERNEL_FILES) -> Iterator[AotConfig]:
    """Every configuration of the given kernel files for one architecture."""
    for name in kernel_files:
        yield from importlib.import_module(f"fastdeit.kernels.{name}").aot_configs(arch)


@functools.cache
def source_key(function: Any) -> str:
    """A hash of a JIT function's code and of all JIT functions and constexpr globals it uses.

    Triton's own `cache_key` also counts the line a function starts on and its comments; those change nothing here.
    """
    closure = _Dependencies(function)
    closure.visit(function.parse())
    return closure.hasher.hexdigest()


def row_key(row: AotConfig, arch: int) -> str:
    """Identifies what `compile_config` would compile: source, types, constants, options, architecture, Triton version."""
    types = argument_types(row)
    facts = (source_key(row.kernel), types, row.num_warps, row.num_stages, arch, triton.__version__)
    facts += () if row.maxnreg is None else (row.maxnreg,)
    facts += () if row.fp_fusion else ("no fp_fusion",)
    if row.unaligned:
        facts += (row.unaligned,)
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def argument_types(row: AotConfig) -> dict[str, str | tuple[str, Any]]:
    """Every argument of the kernel in order: its Triton type, or ("constexpr", value)."""
    return {name: _type(row, name) for name in row.kernel.arg_names}


def compile_config(row: AotConfig, arch: int) -> Resources:
    """Compiles one configuration for compute capability `arch` (such as 90) and reads what it needs.

    Raises:
        RuntimeError: kernels are interpreted in this process, so that nothing can be compiled.
        ValueError: the row's signature and constexprs do not cover the kernel's arguments.
        Whatever Triton raises when the configuration does not compile.
    """
    return resources(compile_binary(row, arch), LIMITS[arch])


def compile_binary(row: AotConfig, arch: int) -> CompiledKernel:
    """The compiled kernel behind `compile_config`."""
    if not isinstance(row.kernel, JITFunction):
        raise RuntimeError("interpreted kernels cannot be compiled: run without TRITON_INTERPRET in the environment")
    types = argument_types(row)
    if unknown := [name for name in (*row.signature, *row.constexprs) if name not in types]:
        raise ValueError(f"{row.kernel.__name__}: no argument named {', '.join(unknown)}")
    signature = {name: "constexpr" if isinstance(t, tuple) else t for name, t in types.items()}
    constants = {name: t[1] for name, t in types.items() if isinstance(t, tuple)}
    aligned = [["tt.divisibility", _ALIGNMENT]]
    attributes = {(i,): aligned for i, name in enumerate(types) if signature[name].startswith("*")}
    source = ASTSource(fn=row.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": row.num_warps, "num_stages": row.num_stages, "maxnreg": row.maxnreg}
    if not row.fp_fusion:
        options["enable_fp_fusion"] = False
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled: CompiledKernel, limits: Limits) -> Resources:
    """Reads a compiled kernel's needs from its binary."""
    metadata = compiled.metadata
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run_tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _run_tool("nvdisasm", "--print-code", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    # A stack frame that nothing loads from or stores to is no spill.
    spilled = stack if re.search(r"\b(LDL|STL)\b", code) else 0
    matrix = {}
    for mnemonic in re.findall(r"(?<![\w.])(?:UTC)?[A-Z]*MMA\b", code):  # not HFMA2.MMA, which moves a constant
        matrix[mnemonic] = matrix.get(mnemonic, 0) + 1
    blocks_per_sm = _blocks_per_sm(registers, metadata.shared, metadata.num_warps, metadata.tmem_size or 0, limits)
    ptx = compiled.asm["ptx"]
    return Resources(
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=metadata.shared,
        blocks_per_sm=blocks_per_sm,
        matrix_instructions=dict(sorted(matrix.items())),
        # In a `#blocked` layout every thread multiplies its own elements.
        scalar_products=len(re.findall(r"\btt\.dot\b.*-> tensor<[^>]*#blocked", compiled.asm["ttgir"])),
        stream=instruction_stream.read(
            sass.parse(code),
            num_warps=metadata.num_warps,
            num_stages=metadata.num_stages,
            blocks_per_sm=blocks_per_sm,
            shared_bytes=metadata.shared,
            ptxas_log=_ptxas_log(ptx) if "wgmma" in ptx else "",
            ptx=ptx,
        ),
    )


def _ptxas_log(ptx: str) -> str:
    """ptxas's messages about wgmma in a kernel. Triton does not keep them where the binary came from its cache."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(ptx)
        file.flush()
        command = [_tool("ptxas"), "-v", f"--gpu-name={target}", file.name, "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


class _Dependencies(DependenciesFinder):
    """Walks a JIT function as Triton does for its cache key, and hashes what `source_key` counts."""

    def __init__(self, function: Any) -> None:
        scope = function.get_capture_scope()
        super().__init__(name=function.__name__, globals=function.__globals__, nonlocals=scope, src="")
        self.hasher.update(_without_comments(function.src).encode())

    def _update_hash(self, func: Any) -> None:
        if hasattr(func, "get_capture_scope"):  # Triton 3.4 passes every name that a function refers to
            self.hasher.update(f"{source_key(func)} {getattr(func, 'noinline', False)}".encode())

    def record_reference(self, val, var_dict=None, name=None):
        super().record_reference(val, var_dict, name)
        if isinstance(val, triton.language.constexpr):
            self.hasher.update(f"{name}={val}".encode())


def _without_comments(source: str) -> str:
    """The source text without comments. `ast.unparse` would give different text on different versions of Python."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _type(row: AotConfig, name: str) -> str | tuple[str, Any]:
    """An argument's type, or ("constexpr", value)."""
    if name in row.signature:
        return row.signature[name]
    if name in row.constexprs:
        return ("constexpr", row.constexprs[name])
    if name.endswith(_OPTIONAL):
        return ("constexpr", None)
    raise ValueError(f"{row.kernel.__name__} ({row.label}): no type and no value for argument {name!r}")


def _blocks_per_sm(registers: int, shared: int, num_warps: int, tensor_columns: int, limits: Limits) -> int:
    """Resident blocks by the CUDA occupancy rules: registers in units of 256 per warp and per quarter of the SM, 1 KB of shared
    memory reserved by the driver per block, and 512 columns of tensor memory where there are any."""
    per_warp = triton.cdiv(max(registers, 1) * 32, 256) * 256
    warps = 4 * (limits.registers_per_sm // 4 // per_warp)
    blocks = min(warps // num_warps, limits.threads_per_sm // (32 * num_warps), limits.blocks_per_sm)
    blocks = min(blocks, limits.shared_per_sm // (triton.cdiv(shared, 128) * 128 + 1024))
    return min(blocks, 512 // tensor_columns) if tensor_columns else blocks


@functools.lru_cache
def _tool(name: str) -> str:
    tool = _TOOLS / name
    if not tool.exists():
        raise FileNotFoundError(f"{tool}: Triton's own copy of {name} is missing, and the report needs it")
    return str(tool)


def _run_tool(name: str, *arguments: str) -> str:
    return subprocess.run([_tool(name), *arguments], capture_output=True, text=True, check=True).stdout

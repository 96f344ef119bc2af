"""Compiles a kernel to PTX, without the assembler, and keeps the text in Triton's cache folder."""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from fastdeit.testing.ptx.program import Program

TESTED_TRITON = ("3.6.", "3.7.", "3.8.", "3.9.")  # the machine knows what these versions emit
_ALIGNED = [["tt.divisibility", 16]]
_STAGES = ("ttir", "ttgir", "llir", "ptx")


class Variant(NamedTuple):
    """What makes one compiled kernel of a source: hashable, and the same for a launch and for the shipped row it hits.

    types: (argument, type) in order, a type as in `Shipped.signature` or ("constexpr", value). unaligned: pointers that are not
    16-byte aligned.
    """

    kernel: JITFunction
    types: tuple[tuple[str, Any], ...]
    unaligned: frozenset[str]
    num_warps: int
    num_stages: int
    fp_fusion: bool = True


class Compiled(NamedTuple):
    program: Program
    shared_bytes: int
    tensor_maps: tuple[dict, ...]  # the compiler's metadata of each tensor descriptor


def why_untested() -> str | None:
    """Why the machine is not to be trusted with this Triton, or None."""
    if triton.__version__.startswith(TESTED_TRITON):
        return None
    return f"the PTX machine is tested with Triton 3.6 to 3.9, this is {triton.__version__}"


@functools.lru_cache(maxsize=512)
def compile_variant(variant: Variant, arch: int) -> Compiled:
    """The PTX of a kernel for one architecture, parsed.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    text, shared_bytes, tensor_maps = compile_to_ptx(variant, arch)
    return Compiled(Program(text), shared_bytes, tuple(tensor_maps))


def compile_to_ptx(variant: Variant, arch: int) -> tuple[str, int, list[dict]]:
    """PTX text, bytes of shared memory, and metadata of tensor descriptors."""
    if not isinstance(variant.kernel, JITFunction):
        raise RuntimeError("interpreted kernels cannot be compiled: run without TRITON_INTERPRET in the environment")
    signature = {n: "constexpr" if isinstance(t, tuple) else t for n, t in variant.types}
    constants = {n: t[1] for n, t in variant.types if isinstance(t, tuple)}
    attributes = {
        (i,): _ALIGNED
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") and name not in variant.unaligned
    }
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = backend.parse_options(
        {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": variant.fp_fusion}
    )
    facts = json.dumps([source.hash(), options.hash(), arch, triton.__version__])
    cache = get_cache_manager(hashlib.sha256(facts.encode()).hexdigest())
    if path := cache.get_file("ptx.json"):
        with open(path) as file:
            return tuple(json.load(file))
    metadata: Mapping[str, Any] = {"target": target, **options.__dict__}
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    for stage in _STAGES:
        module = stages[stage](module, metadata)
    if metadata["global_scratch_size"]:
        raise NotImplementedError(f"{variant.kernel.__name__} needs global scratch memory")
    found = module, metadata["shared"], list(metadata.get("tensordesc_meta") or [])
    cache.put(json.dumps(found), "ptx.json", binary=False)
    return found

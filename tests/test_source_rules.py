"""What no test of behaviour on a CPU can see, held by reading the source."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ("fastdeit", "kernels", "benchmarks")
READABLE_VARIABLES = {
    "TRITON_INTERPRET",  # Triton's own switch, on which kernels are interpreted
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",  # torchrun's
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_LOCALID",
    "SLURM_JOB_NODELIST",  # set by Slurm's srun
}
NAN_DROPPING = {"minimum", "maximum", "clamp"}
TRITON_LANGUAGE = {"tl", "triton.language", "gl", "libdevice", "tl.math"}


def name_of(node: ast.AST) -> str:
    """The dotted name that an expression is, or an empty string."""
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def jit_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            decorators = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
            if any(name_of(d).split(".")[-1] == "jit" for d in decorators):
                yield node


def nan_dropping(source: str) -> list[int]:
    """Lines of `tl.minimum`, `tl.maximum`, `tl.clamp`, and of `min` and `max` in a kernel, that lose a NaN on a GPU.

    Without `propagate_nan=tl.PropagateNan.ALL` they return the other operand there, while the interpreter keeps the
    NaN. Where the operands are integers a comment on the call's line says so: `# no NaN: <what they are>`.
    """
    tree, lines, found = ast.parse(source), source.splitlines(), []
    in_kernels = {id(node) for function in jit_functions(tree) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        base, _, last = name_of(node.func).rpartition(".")
        builtin = not base and last in {"min", "max"} and id(node) in in_kernels
        if not builtin and not (last in NAN_DROPPING and (base in TRITON_LANGUAGE or id(node) in in_kernels)):
            continue
        kept = any(k.arg == "propagate_nan" and name_of(k.value).endswith("PropagateNan.ALL") for k in node.keywords)
        text = "\n".join(lines[node.lineno - 1 : node.end_lineno + 1])  # the comment may close a header that was split
        if not kept and not re.search(r"# no NaN: \S", text):
            found.append(node.lineno)
    return found


def autotuned(source: str) -> list[int]:
    """Lines that name `autotune`: configurations come from a table, so that a run's first step costs what others do."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and node.attr == "autotune")
        or (isinstance(node, ast.ImportFrom) and any(alias.name == "autotune" for alias in node.names))
    ]


def environment_reads(source: str) -> list[int]:
    """Lines that read the environment, but for the variables above by their literal names.

    Behaviour is chosen by arguments. `os.environ` as a whole may be handed on to a child process through `env=`.
    """
    tree, found = ast.parse(source), []
    allowed = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and name_of(node.func) in {"os.environ.get", "os.environ.setdefault", "os.getenv"}
            and node.args
        ):
            key, holder = node.args[0], node.func
        elif isinstance(node, ast.Subscript) and name_of(node.value) == "os.environ":
            key, holder = node.slice, node.value
        elif isinstance(node, ast.Compare) and name_of(node.comparators[0]) == "os.environ":
            key, holder = node.left, node.comparators[0]
        elif isinstance(node, ast.keyword) and node.arg == "env":
            allowed |= {id(inner) for inner in ast.walk(node.value)}
            continue
        else:
            continue
        if isinstance(key, ast.Constant) and key.value in READABLE_VARIABLES:
            allowed |= {id(inner) for inner in ast.walk(holder)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {a.name for a in node.names} & {"environ", "getenv"}
        ) or (name_of(node) in {"os.environ", "os.environb", "os.getenv"} and id(node) not in allowed):
            found.append(node.lineno)
    return found


def unfinished(source: str) -> list[int]:
    """Lines that promise work instead of doing it."""
    promise = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|HA" + r"CK)\b")
    return [number for number, line in enumerate(source.splitlines(), 1) if promise.search(line)]


def bare_imports(source: str) -> list[int]:
    """Lines that import `kernels` or `benchmarks` by their directory's name instead of from `fastdeit`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        found += [node.lineno for name in names if name.split(".")[0] in {"kernels", "benchmarks"}]
    return found


def private_imports(source: str) -> list[int]:
    """Lines that import a name with a leading underscore from another file of the project."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "fastdeit")
        if any(re.match("_[^_]", alias.name) for alias in node.names)
    ]


def steers_the_formatter(source: str) -> list[int]:
    """Lines with a comment for the formatter, and with what is packed and unpacked in one place, `*(a, b)` or `**{"a": 1}`."""
    packed = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Starred(value=ast.Tuple() | ast.List() as literal, ctx=ast.Load()):
                packed.append(literal.lineno)
            case ast.keyword(arg=None, value=ast.Dict() as literal):
                packed += [literal.lineno] * all(isinstance(key, ast.Constant) for key in literal.keys)
            case ast.Dict(keys=keys, values=values):
                inner = [value for key, value in zip(keys, values, strict=True) if key is None]
                literals = [value for value in inner if isinstance(value, ast.Dict)]
                packed += [d.lineno for d in literals if all(isinstance(key, ast.Constant) for key in d.keys)]
    return packed + [number for number, line in enumerate(source.splitlines(), 1) if re.search(r"# fmt" + r":", line)]


def sizes_in_a_tuple(source: str) -> list[int]:
    """Lines that give `new_empty` its sizes as a tuple or a shape: one by one an allocation costs 0.6 to 1.2 us less."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and name_of(node.func).endswith(".new_empty") and node.args
        if (isinstance(node.args[0], ast.Tuple) and node.args[0].elts) or name_of(node.args[0]).endswith("shape")
    ]


RULES = {  # rule: (the directories it is for, file patterns)
    nan_dropping: (PACKAGE, ("*.py",)),
    autotuned: (PACKAGE, ("*.py",)),
    environment_reads: (PACKAGE, ("*.py",)),
    unfinished: ((*PACKAGE, "tests", "docs"), ("*.py", "*.md", "*.yaml")),
    bare_imports: ((*PACKAGE, "tests", "docs"), ("*.py",)),
    private_imports: ((*PACKAGE, "tests"), ("*.py",)),
    steers_the_formatter: ((*PACKAGE, "tests", "docs", "examples"), ("*.py",)),
    sizes_in_a_tuple: (("kernels",), ("*.py",)),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_sources_keep_the_rule(rule: Callable[[str], list[int]]):
    directories, patterns = RULES[rule]
    paths = sorted(p for d in directories for pattern in patterns for p in (ROOT / d).rglob(pattern))
    assert paths
    broken = [f"{p.relative_to(ROOT)}:{line}" for p in paths for line in rule(p.read_text(encoding="utf-8"))]
    assert broken == []


KERNEL = "@triton.jit\ndef f_kernel(x):\n    return "


@pytest.mark.parametrize(
    "rule, source",
    [
        (nan_dropping, KERNEL + "tl.maximum(x, 0.0)"),
        (nan_dropping, KERNEL + "tl.clamp(x, 0.0, 1.0)"),
        (nan_dropping, KERNEL + "max(x, 0.0)"),
        (nan_dropping, KERNEL + "tl.minimum(x, 1.0, propagate_nan=tl.PropagateNan.NONE)"),
        (nan_dropping, KERNEL + "tl.minimum(x, 1.0)  # no NaN:"),
        (nan_dropping, "@triton.jit(do_not_specialize=['M'])\ndef f(x, M):\n    return min(x, M)"),
        (autotuned, "@triton.autotune(configs=[], key=[])\n@triton.jit\ndef f(x):\n    pass"),
        (autotuned, "from triton import autotune"),
        (environment_reads, "import os\nfast = os.environ.get('FASTDEIT_FAST')"),
        (environment_reads, "import os\nfast = os.environ['FASTDEIT_FAST']"),
        (environment_reads, "import os\nfast = os.getenv('FASTDEIT_FAST')"),
        (environment_reads, "import os\nfast = 'FASTDEIT_FAST' in os.environ"),
        (environment_reads, "import os\nname = 'RANK'\nrank = os.environ[name]"),
        (environment_reads, "from os import environ"),
        (unfinished, "x = 1  # TO" + "DO: the rest"),
        (bare_imports, "from kernels.layer_norm import layer_norm_forward"),
        (bare_imports, "def f():\n    import kernels"),
        (bare_imports, "import benchmarks.command"),
        (private_imports, "from fastdeit.backends import _backend"),
        (private_imports, "def f():\n    from .tiles import _tile"),
        (sizes_in_a_tuple, "y = x.new_empty((M, N), dtype=x.dtype)"),
        (sizes_in_a_tuple, "y = x.new_empty(x.shape)"),
        (steers_the_formatter, "f(*(a, b), c)"),
        (steers_the_formatter, "x = [\n    *[1, 2],\n]"),
        (steers_the_formatter, "x = (1, 2)  # fmt" + ": skip"),
        (steers_the_formatter, "f(**{'a': 1})"),
        (steers_the_formatter, "x = {\n    **{'a': 1},\n    **{'b': 2},\n}"),
    ],
)
def test_a_violation_is_found(rule: Callable[[str], list[int]], source: str):
    assert rule(source)


@pytest.mark.parametrize(
    "rule, source",
    [
        (nan_dropping, KERNEL + "tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)"),
        (nan_dropping, KERNEL + "tl.minimum(x, 63)  # no NaN: row numbers"),
        (nan_dropping, "def select_config(n):\n    return max(16, n)"),
        (nan_dropping, "torch.maximum(a, b)"),
        (environment_reads, "import os\nrank = int(os.environ.get('RANK', 0))"),
        (environment_reads, "import os\nrank = int(os.environ['RANK'])"),
        (environment_reads, "import os\ndistributed = 'RANK' in os.environ"),
        (environment_reads, "import os, subprocess\nsubprocess.run(['x'], env={**os.environ, 'A': '1'})"),
        (bare_imports, "from fastdeit.kernels import launch"),
        (bare_imports, "from . import kernels"),
        (private_imports, "from fastdeit import __version__\nfrom torch import _C"),
        (sizes_in_a_tuple, "y, z, loss = x.new_empty(*x.shape), x.new_empty(M, N), x.new_empty(())"),
        (steers_the_formatter, "f(*pair, *(t for t in pair), *[t for t in pair])\n(a, *b) = pair"),
        (steers_the_formatter, "f(**{name: 1})\nf(**{**SMALL, 'a': 1})\nx = {**{f'{n}': n for n in range(3)}, **rest}"),
    ],
)
def test_what_the_rule_is_not_about_is_let_through(rule: Callable[[str], list[int]], source: str):
    assert rule(source) == []

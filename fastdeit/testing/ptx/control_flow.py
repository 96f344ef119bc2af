"""Where the instructions of a kernel lead, and behind which branches the code lies that a run did not execute."""

from collections import defaultdict

from fastdeit.testing.ptx.program import Instruction, Operand, Program, Register


def successors(program: Program) -> dict[int, list[int]]:
    """Number of an instruction -> numbers of those that may follow it."""
    found = {}
    for i, instruction in enumerate(program.instructions):
        following = [] if instruction.opcode in ("ret", "exit", "brx.idx", "bra.uni") else [i + 1]
        if instruction.opcode in ("bra", "bra.uni"):
            following = ([i + 1] if instruction.guard else []) + [program.target(instruction)]
        elif instruction.opcode == "brx.idx":
            following = program.listed_targets(instruction)
        found[i] = following
    return found


def predecessors(program: Program) -> dict[int, list[int]]:
    """The same backwards."""
    found: dict[int, list[int]] = defaultdict(list)
    for i, following in successors(program).items():
        for j in following:
            found[j].append(i)
    return found


def is_register(operand: Operand | None, register: Register) -> bool:
    return isinstance(operand, Register) and operand.index == register.index


def definition(program: Program, register: Register) -> Instruction | None:
    """The one instruction whose first operand is a register; None where several have it, or none."""
    writing = [x for x in program.instructions if x.operands and is_register(x.operands[0], register)]
    return writing[0] if len(writing) == 1 else None


def uses(program: Program, register: Register) -> list[Instruction]:
    """Instructions that name a register other than as their first operand."""
    return [x for x in program.instructions if any(is_register(o, register) for o in (*x.operands[1:], x.guard))]


def governs_only_copies(program: Program, predicate: Register) -> bool:
    """Whether a predicate only decides how many bytes asynchronous copies copy."""
    return _governs_only(program, predicate, ends=("cp.async.ca", "cp.async.cg"), through=("selp.b32", "and.pred"))


def governs_only_branches(program: Program, predicate: Register) -> bool:
    """Whether a predicate only decides where branches lead, by itself or through the bound that a loop's condition compares."""
    return _governs_only(program, predicate, ends=("bra",), through=("selp.b32", "setp."))


def _governs_only(program: Program, predicate: Register, ends: tuple[str, ...], through: tuple[str, ...]) -> bool:
    """Whether a predicate decides nothing but what instructions do whose opcodes begin with one of `ends`, by itself or by what
    those that begin with one of `through` make of it."""
    todo, seen = [predicate], set[int]()
    while todo:
        register = todo.pop()
        if register.index in seen:
            continue
        seen.add(register.index)
        for user in uses(program, register):
            if user.opcode.startswith(ends):
                continue
            target = user.operands[0]
            if not user.opcode.startswith(through) or not isinstance(target, Register):
                return False
            todo.append(target)
    return True


def branches_past(program: Program, executed: set[int]) -> list[str]:
    """The branches of a run that always went one way, past code that it did not execute, each with its condition.

    executed: lines.
    """
    found = []
    for i, following in successors(program).items():
        branch = program.instructions[i]
        if branch.line not in executed or all(program.instructions[j].line in executed for j in following):
            continue
        condition = branch.guard and definition(program, branch.guard)
        found.append(f"line {branch.line}, {branch.text}" + (f" ({condition.text})" if condition else ""))
    return found

"""wgmma in every shape, type and layout that is emitted, and the order that its registers and memory need (ISA 9.7.15)."""

import numpy as np
import pytest

from fastdeit.testing.ptx.machine import IN_STEP, Fault, Schedule

SIZES = {"bf16": 2, "f16": 2, "tf32": 4}
SHUFFLED = Schedule(seed=2, shuffled=True)
A_AT, B_AT = 0, 32768


def as_bits(values, kind):
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16) if kind == "bf16" else bits


def stored(matrix, kind, width, transposed):
    """(words, descriptor at 0): a (rows, K) operand as the ISA's canonical layouts have it.

    K contiguous: groups of 8 rows of `width` bytes, one below the other; the stride offset is the size of a group. Transposed,
    that is rows contiguous: atoms of `width` bytes of rows by 8 of K; the stride offset leads to the next 8 of K, the leading
    offset to the next `width` bytes of rows. Chunks of 16 bytes are swizzled within rows of 128 bytes.
    """
    size = SIZES[kind]
    rows, depth = matrix.shape
    bits = as_bits(matrix, kind)
    memory = np.zeros(16384, np.uint16 if size == 2 else np.uint32)
    per_row = width // size
    stride, leading = 8 * width, 0
    if transposed:
        leading = stride * (depth // 8)
    for r in range(rows):
        for k in range(depth):
            if transposed:
                byte = (r // per_row) * leading + (k // 8) * stride + (k % 8) * width + (r % per_row) * size
            else:
                byte = (r // 8) * stride + (r % 8) * width + k * size
            mask = {32: 1, 64: 3, 128: 7}[width]
            byte ^= (byte >> 7 & mask) << 4
            memory[byte // size] = bits[r, k]
    mode = {32: 3, 64: 2, 128: 1}[width]
    words = np.ascontiguousarray(memory).view(np.uint32)
    return words, mode << 62 | (stride >> 4) << 32 | (leading >> 4) << 16


def run(
    execute,
    kind,
    n,
    a,
    b,
    *,
    width=128,
    a_transposed=False,
    b_transposed=False,
    registers=False,
    c=None,
    signs=(1, 1),
    schedule=IN_STEP,
    parts=None,
    advance=0,
):
    """D (64, n) of one wgmma over operands in shared memory (A in registers if asked), stored there by generic stores."""
    size, depth = SIZES[kind], 32 // SIZES[kind]
    inputs, lines = {}, []

    def fill(words, start):
        used = np.flatnonzero(words)
        count = -(-(int(used.max()) + 1 if len(used) else 1) // 128)
        for i in range(count):
            name = f"%r{len(inputs) + 200}"
            inputs[name] = words[128 * i : 128 * (i + 1)].copy()
            lines.append(f"st.shared.b32 [%r90+{start + 512 * i}], {name};")

    lines.append("shl.b32 %r90, %tid, 2;")
    b_words, b_descriptor = stored(b, kind, width, b_transposed)
    fill(b_words, B_AT)
    if registers:
        lane = np.arange(128)
        warp, lane = lane // 32, lane % 32
        per = 4 // size
        for j in range(4):
            value = np.zeros(128, np.uint32)
            for e in range(per):
                column = per * (lane % 4) + e + depth // 2 * (j // 2)
                element = a[16 * warp + lane // 4 + 8 * (j % 2), column]
                value |= as_bits(element, kind).astype(np.uint32) << np.uint32(16 * e)
            inputs[f"%r{190 + j}"] = value
        operand = "{%r190, %r191, %r192, %r193}"
    else:
        a_words, a_descriptor = stored(a, kind, width, a_transposed)
        fill(a_words, A_AT)
        lines.append(f"mov.b64 %rd1, {a_descriptor + (advance >> 4)};")
        operand = "%rd1"
    lines.append(f"mov.b64 %rd2, {b_descriptor + (B_AT + advance >> 4)};")
    results = [f"%r{j}" for j in range(n // 2)]
    if c is not None:
        for j, name in enumerate(results):
            lane = np.arange(128)
            row, column = 16 * (lane // 32) + lane % 32 // 4 + 8 * (j // 2 % 2), 8 * (j // 4) + 2 * (lane % 4) + j % 2
            inputs[name] = c[row, column].astype(np.float32).view(np.uint32)
    flags = (
        ""
        if kind == "tf32"
        else f", {int(b_transposed)}"
        if registers
        else f", {int(a_transposed)}, {int(b_transposed)}"
    )
    scale = "1" if c is not None else "0"
    order = dict(
        fence="fence.proxy.async.shared::cta;",
        barrier="bar.sync 0;",
        wgmma_fence="wgmma.fence.sync.aligned;",
        before="",
        commit="wgmma.commit_group.sync.aligned;",
        early="",
        wait="wgmma.wait_group.sync.aligned 0;",
    ) | (parts or {})
    lines += [order["fence"], order["barrier"], order["wgmma_fence"], order["before"]]
    lines.append(
        f"wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{kind}.{kind} {{{', '.join(results)}}}, {operand}, %rd2, "
        f"{scale}, {signs[0]}, {signs[1]}{flags};"
    )
    lines += [order["commit"], order["early"], order["wait"]]
    found = execute("\n".join(lines), inputs, results, threads=128, shared=65536, schedule=schedule)
    d = np.empty((64, n), np.float32)
    lane = np.arange(128)
    for j, value in enumerate(found):
        d[16 * (lane // 32) + lane % 32 // 4 + 8 * (j // 2 % 2), 8 * (j // 4) + 2 * (lane % 4) + j % 2] = value.view(
            np.float32
        )
    return d


def operands(kind, n, seed=0):
    rng = np.random.default_rng(seed)
    depth = 32 // SIZES[kind]
    return rng.integers(-8, 9, (64, depth)).astype(np.float32), rng.integers(-8, 9, (n, depth)).astype(np.float32)


@pytest.mark.parametrize("n", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("registers", [False, True])
def test_every_shape_and_type(execute, kind, n, registers):
    a, b = operands(kind, n)
    assert (run(execute, kind, n, a, b, registers=registers) == a @ b.T).all()


def test_the_widest_shape(execute):
    a, b = operands("bf16", 256)
    assert (run(execute, "bf16", 256, a, b, width=32) == a @ b.T).all()


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_every_swizzle_and_order(execute, width, a_transposed, b_transposed):
    a, b = operands("bf16", 64, seed=width)
    found = run(execute, "bf16", 64, a, b, width=width, a_transposed=a_transposed, b_transposed=b_transposed)
    assert (found == a @ b.T).all()


@pytest.mark.parametrize("kind", ["bf16", "tf32"])
def test_a_descriptor_that_starts_within_a_swizzled_row_takes_the_next_k(execute, kind):
    """The compiler walks along K by adding 32 bytes to the start; the swizzle goes by absolute addresses."""
    depth = 32 // SIZES[kind]
    rng = np.random.default_rng(3)
    a, b = (
        rng.integers(-8, 9, (64, 2 * depth)).astype(np.float32),
        rng.integers(-8, 9, (32, 2 * depth)).astype(np.float32),
    )
    found = run(execute, kind, 32, a, b, advance=32)
    assert (found == a[:, depth:] @ b[:, depth:].T).all()


def test_accumulation_and_signs(execute):
    a, b = operands("bf16", 16)
    c = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
    assert (run(execute, "bf16", 16, a, b, c=c) == a @ b.T + c).all()
    assert (run(execute, "bf16", 16, a, b, c=c, signs=(-1, 1)) == c - a @ b.T).all()
    assert (run(execute, "bf16", 16, a, b, c=c, signs=(-1, -1), schedule=SHUFFLED) == a @ b.T + c).all()


BROKEN = {
    "no proxy fence": (dict(fence=""), {}, "missing proxy fence"),
    "no barrier": (dict(barrier=""), {}, "asynchronous read of what another thread wrote"),
    "no wgmma.fence": (dict(wgmma_fence=""), {}, "no wgmma.fence before the first"),
    "accumulator changed after the fence": (dict(before="mov.b32 %r0, 0;"), {}, "no wgmma.fence between an access"),
    "A changed after the fence": (dict(before="mov.b32 %r190, 0;"), dict(registers=True), "no wgmma.fence between an"),
    "result read early": (dict(early="add.f32 %r99, %r0, %r0;"), {}, "a result is read before wgmma.wait_group"),
    "result changed early": (dict(early="mov.b32 %r0, 0;"), {}, "a register is changed before wgmma.wait_group"),
    "A changed early": (dict(early="mov.b32 %r190, 0;"), dict(registers=True), "a register is changed before"),
    "no wait": (dict(wait=""), {}, "a result is read before wgmma.wait_group"),
    "wait for all but one": (
        dict(wait="wgmma.wait_group.sync.aligned 1;"),
        {},
        "a result is read before wgmma.wait_group",
    ),
    "no commit": (dict(commit=""), {}, "a result is read before wgmma.wait_group"),
    "memory changed early": (
        dict(early="st.shared.b32 [%r90+32768], %r90;"),
        {},
        "wgmma or a tensor store may still read",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("schedule", [IN_STEP, SHUFFLED], ids=["in step", "shuffled"])
def test_a_broken_order_is_a_fault(execute, name, schedule):
    parts, form, message = BROKEN[name]
    a, b = operands("bf16", 16)
    with pytest.raises(Fault, match=message):
        run(execute, "bf16", 16, a, b, parts=parts, schedule=schedule, **form)


AGAIN = "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{d}}}, %rd1, %rd2, {scale}, 1, 1, 0, 0;"
END = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;"


def again(between, n=16, scale=1):
    """`parts` with a second wgmma on the first n / 2 results, after the first one's wait and what comes `between`."""
    product = AGAIN.format(n=n, d=", ".join(f"%r{j}" for j in range(n // 2)), scale=scale)
    return dict(wait="\n".join(["wgmma.wait_group.sync.aligned 0;", between, product, END]))


@pytest.mark.parametrize("schedule", [IN_STEP, SHUFFLED], ids=["in step", "shuffled"])
def test_products_of_one_shape_follow_each_other_without_a_fence(execute, schedule):
    a, b = operands("bf16", 16)
    found = run(execute, "bf16", 16, a, b, parts=again(""), schedule=schedule)
    assert (found == 2 * (a @ b.T)).all()


@pytest.mark.parametrize(
    "between",
    ["mov.b32 %r0, 0;", "mov.b32 %r0, %r1;", "add.f32 %r99, %r0, %r0;", "mov.b32 %r99, %r0;"],
    ids=["set", "copied to", "read", "copied from"],
)
def test_an_access_between_two_products_needs_a_fence(execute, between):
    a, b = operands("bf16", 16)
    fence = "wgmma.fence.sync.aligned;"
    # the last one overwrites the register without reading it
    for parts in (again(between), again(f"{fence}\n{between}"), again(between, scale=0)):
        with pytest.raises(Fault, match=r"no wgmma\.fence between an access"):
            run(execute, "bf16", 16, a, b, parts=parts)
    run(execute, "bf16", 16, a, b, parts=again(f"{between}\n{fence}"))


def test_a_product_of_another_shape_needs_a_fence(execute):
    a, b = operands("bf16", 16)
    with pytest.raises(Fault, match="two shapes"):
        run(execute, "bf16", 16, a, b, parts=again("", n=8))
    found = run(execute, "bf16", 16, a, b, parts=again("wgmma.fence.sync.aligned;", n=8))
    assert (found[:, :8] == 2 * (a @ b[:8].T)).all()


def test_memory_that_a_product_read_is_written_behind_a_barrier(execute):
    """Each warp's wait is for its own part of the product, and every part reads all of B."""
    a, b = operands("bf16", 16)
    wait, write = "wgmma.wait_group.sync.aligned 0;", f"st.shared.b32 [%r90+{B_AT}], %r90;"
    with pytest.raises(Fault, match="write after read of another thread"):
        run(execute, "bf16", 16, a, b, parts=dict(wait=f"{wait}\n{write}"))
    run(execute, "bf16", 16, a, b, parts=dict(wait=f"{wait}\nbar.sync 0;\n{write}"))


def test_a_move_of_a_result_under_way_reads_it(execute):
    a, b = operands("bf16", 8)
    with pytest.raises(Fault, match="a result is read before"):
        run(execute, "bf16", 8, a, b, parts=dict(early="mov.b32 %r99, %r0;"))


def test_a_part_of_a_warpgroup_cannot_multiply(execute):
    a, b = operands("bf16", 8)
    with pytest.raises(Fault, match="not all threads of the group reach"):
        run(
            execute,
            "bf16",
            8,
            a,
            b,
            parts=dict(
                wgmma_fence="setp.lt.u32 %p1, %tid, 64;\n@%p1 bra $LE;\nwgmma.fence.sync.aligned;\n$LE: mov.b32 %r98, 0;"
            ),
        )

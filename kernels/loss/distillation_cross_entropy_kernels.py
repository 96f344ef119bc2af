"""The kernels of the distillation loss: cross-entropy of two heads, and distillation from a teacher, over rows of C classes.

A program owns one row, in backward one block of a row. Forward reads each row of logits, soft targets and teacher once, block by
block with online softmax sums, and keeps of it a few statistics and the teacher's label; backward rereads the row, multiplies by
the upstream gradient where it lies on the device, and rounds once. All arithmetic is fp32, and every sum has a fixed order, so
that repeated runs give the same bits.

A softmax is kept as (maximum, log of the sum of exp(x - maximum)) rather than as their sum: beside logits of 1e4 the second would
lose all its digits.
"""

import triton
import triton.language as tl

STATISTICS: tl.constexpr = tl.constexpr(7)  # that forward keeps of a row


@triton.jit
def _row(ptr, row, stride, VECTOR: tl.constexpr):
    return ptr + tl.multiple_of(row * stride, VECTOR)


@triton.jit
def _shifted(x, maximum):
    """The running maximum with x, and the same as something to subtract: 0 as long as all was -inf, where -inf - -inf is NaN."""
    maximum = tl.maximum(maximum, tl.max(x, axis=0), propagate_nan=tl.PropagateNan.ALL)
    return maximum, tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _log1p(x):
    # log(1 + x) loses the digits of a small x; this correction restores them (Goldberg 1991, theorem 4).
    one_more = 1.0 + x
    return tl.where(one_more == 1.0, x, tl.log(one_more) * (x / (one_more - 1.0)))


@triton.jit
def _binary_cross_entropy(x, target):
    """-t log sigmoid(x) - (1 - t) log sigmoid(-x), where a factor of zero leaves nothing of an infinite logarithm."""
    both = _log1p(tl.exp(-tl.abs(x)))
    yes = tl.where(target == 0.0, 0.0, target * (both - tl.where(x > 0.0, 0.0, x)))
    no = tl.where(target == 1.0, 0.0, (1.0 - target) * (both + tl.where(x < 0.0, 0.0, x)))
    return yes + no


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, small, 1.0) / (1.0 + small)


@triton.jit
def _argmax_key(x, col):
    """An int64 whose largest belongs to the first of the largest x, a NaN above all, as torch.argmax has it."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 counts as 0.0
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(x != x, 0x7FFFFFFF, order)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - col)


@triton.jit
def _argmax_column(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["logits_stride", "dist_stride", "target_stride", "teacher_stride"])
def distillation_cross_entropy_forward_kernel(
    logits_ptr,  # (B, C), rows logits_stride apart; None without a base term, then dist is there
    dist_ptr,  # (B, C); None without a distillation term or where it reads logits
    target_ptr,  # (B, C) floats or (B,) indices; None without a base term
    teacher_ptr,  # (B, C) floats or (B,) indices; None without a distillation term
    loss_ptr,  # (B,) of any float dtype
    statistics_ptr,  # (B, STATISTICS) fp32: maximum and log-sum of logits, sum of the target, then both of dist and of teacher
    teacher_label_ptr,  # (B,) int32, the hard teacher's label, -1 where it is out of range; or None
    logits_stride,
    dist_stride,
    target_stride,
    teacher_stride,
    base_weight,
    dist_weight,
    label_smoothing,
    inverse_tau,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides C and every stride: lets loads be 16 bytes wide
    BASE: tl.constexpr,  # "cross_entropy", "binary_cross_entropy" or "none"
    KIND: tl.constexpr,  # "none", "hard" or "soft"
    SOFT_TARGET: tl.constexpr,
    TEACHER_LABELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    minus_inf = float("-inf")

    if BASE != "none":
        logits_row = _row(logits_ptr, row, logits_stride, VECTOR)
        if SOFT_TARGET:
            target_row = _row(target_ptr, row, target_stride, VECTOR)
        else:
            label = tl.load(target_ptr + row * target_stride).to(tl.int64)
    if KIND != "none":
        if dist_ptr is not None:
            dist_row = _row(dist_ptr, row, dist_stride, VECTOR)
        else:
            dist_row = _row(logits_ptr, row, logits_stride, VECTOR)
        if TEACHER_LABELS:
            teacher_label = tl.load(teacher_ptr + row * teacher_stride).to(tl.int64)
        else:
            teacher_row = _row(teacher_ptr, row, teacher_stride, VECTOR)

    base_sum = 0.0  # of exp(z - shift); of the loss for binary cross-entropy
    base_max = minus_inf
    base_shift = 0.0
    target_sum = 0.0
    target_dot = 0.0  # sum of t * (z - shift), t = 1 for smoothing
    dist_sum = 0.0
    dist_max = minus_inf
    dist_shift = 0.0
    teacher_sum = 0.0
    teacher_max = minus_inf
    teacher_shift = 0.0
    divergence = 0.0  # sum of exp(u) * (u - v), u and v the shifted logits of teacher and student over tau
    best = tl.full([], -(2**63), tl.int64)  # the largest of _argmax_key

    for start in tl.range(0, C, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < C
        if BASE != "none":
            z = tl.load(logits_row + col, inside, other=minus_inf).to(tl.float32)
            if SOFT_TARGET:
                t = tl.load(target_row + col, inside, other=0.0).to(tl.float32)
        if KIND != "none":
            if dist_ptr is not None or BASE == "none":
                v = tl.load(dist_row + col, inside, other=minus_inf).to(tl.float32)
            else:
                v = z
            if not TEACHER_LABELS:
                u = tl.load(teacher_row + col, inside, other=minus_inf).to(tl.float32)

        if BASE == "cross_entropy":
            previous = base_shift
            new_max, base_shift = _shifted(z, base_max)
            shifted = z - base_shift
            base_sum = base_sum * tl.exp(base_max - base_shift) + tl.sum(tl.exp(shifted), axis=0)
            base_max = new_max
            if SOFT_TARGET:
                masked = (t == 0.0) & (z == minus_inf)
                target_dot += target_sum * (previous - base_shift)
                target_dot += tl.sum(tl.where(masked, 0.0, t * shifted), axis=0)
                target_sum += tl.sum(t, axis=0)
            else:
                target_dot += start * (previous - base_shift) + tl.sum(tl.where(inside, shifted, 0.0), axis=0)
        if BASE == "binary_cross_entropy":
            if not SOFT_TARGET:
                t = tl.where(col == label, 1.0, 0.0)
            base_sum += tl.sum(tl.where(inside, _binary_cross_entropy(z, t), 0.0), axis=0)

        if KIND == "hard":
            new_max, dist_shift = _shifted(v, dist_max)
            dist_sum = dist_sum * tl.exp(dist_max - dist_shift) + tl.sum(tl.exp(v - dist_shift), axis=0)
            dist_max = new_max
            if not TEACHER_LABELS:
                best = tl.maximum(best, tl.max(_argmax_key(u, col), axis=0))  # no NaN: integers
        if KIND == "soft":
            previous_dist, previous_teacher = dist_shift, teacher_shift
            new_max, dist_shift = _shifted(v, dist_max)
            new_teacher_max, teacher_shift = _shifted(u, teacher_max)
            v = (v - dist_shift) * inverse_tau
            u = (u - teacher_shift) * inverse_tau
            dist_sum = dist_sum * tl.exp((dist_max - dist_shift) * inverse_tau) + tl.sum(tl.exp(v), axis=0)
            # What was summed so far moves to the new shifts: exp(u) by a factor, u - v by a difference.
            factor = tl.exp((teacher_max - teacher_shift) * inverse_tau)
            moved = ((previous_teacher - teacher_shift) - (previous_dist - dist_shift)) * inverse_tau
            moved_divergence = factor * (divergence + teacher_sum * moved)
            weight = tl.exp(u)
            divergence = tl.where(factor == 0.0, 0.0, moved_divergence)
            divergence += tl.sum(tl.where(weight == 0.0, 0.0, weight * (u - v)), axis=0)
            teacher_sum = teacher_sum * factor + tl.sum(weight, axis=0)
            dist_max = new_max
            teacher_max = new_teacher_max

    base_loss = 0.0
    base_log = 0.0
    if BASE == "binary_cross_entropy":
        base_loss = base_sum / C
    if BASE == "cross_entropy":
        base_log = tl.log(base_sum)
        if SOFT_TARGET:
            base_loss = target_sum * base_log - target_dot
        else:
            picked = tl.load(logits_row + label, (label >= 0) & (label < C), other=0.0).to(tl.float32)
            base_loss = (base_max - picked) + base_log
            if label_smoothing > 0.0:  # else 0 * inf where a class is masked
                base_loss = (1.0 - label_smoothing) * base_loss + label_smoothing * (base_log - target_dot / C)
    if BASE != "none":
        if not SOFT_TARGET:
            base_loss = tl.where((label >= 0) & (label < C), base_loss, float("nan"))

    dist_loss = 0.0
    dist_log = 0.0
    teacher_log = 0.0
    if KIND != "none":
        dist_log = tl.log(dist_sum)
    if KIND == "hard":
        if not TEACHER_LABELS:
            teacher_label = _argmax_column(best)
        valid = (teacher_label >= 0) & (teacher_label < C)
        picked = tl.load(dist_row + teacher_label, valid, other=0.0).to(tl.float32)
        dist_loss = tl.where(valid, (dist_max - picked) + dist_log, float("nan"))
        if teacher_label_ptr is not None:
            tl.store(teacher_label_ptr + row, tl.where(valid, teacher_label, -1).to(tl.int32))
    if KIND == "soft":
        teacher_log = tl.log(teacher_sum)
        dist_loss = divergence / teacher_sum - teacher_log + dist_log

    loss = tl.where(base_weight == 0.0, 0.0, base_weight * base_loss)
    loss += tl.where(dist_weight == 0.0, 0.0, dist_weight * dist_loss)
    tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty))
    if statistics_ptr is not None:
        statistics_row = statistics_ptr + row * STATISTICS
        tl.store(statistics_row, base_max)
        tl.store(statistics_row + 1, base_log)
        tl.store(statistics_row + 2, target_sum)
        tl.store(statistics_row + 3, dist_max)
        tl.store(statistics_row + 4, dist_log)
        tl.store(statistics_row + 5, teacher_max)
        tl.store(statistics_row + 6, teacher_log)


@triton.jit(do_not_specialize=["B"])
def loss_sum_forward_kernel(
    row_loss_ptr,  # (B,) fp32
    loss_ptr,  # scalar of any float dtype
    B,
    divisor,
    BLOCK: tl.constexpr,
):
    """One program adds all rows in a fixed order."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, B, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.load(row_loss_ptr + row, row < B, other=0.0)
    tl.store(loss_ptr, (tl.sum(total, axis=0) / divisor).to(loss_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["dloss_stride", "logits_stride", "dist_stride", "target_stride", "teacher_stride"])
def distillation_cross_entropy_backward_kernel(
    dloss_ptr,  # the upstream gradient, dloss_stride apart: (B,), or a scalar and 0
    logits_ptr,  # this and the next three as in forward
    dist_ptr,
    target_ptr,
    teacher_ptr,  # read by soft distillation only
    statistics_ptr,  # (B, STATISTICS) fp32, forward's
    teacher_label_ptr,  # (B,) int32, forward's; None but for hard distillation
    dlogits_ptr,  # (B, C), with dist's share where dist reads logits; None where not wanted
    ddist_ptr,  # (B, C) or None
    dloss_stride,
    logits_stride,
    dist_stride,
    target_stride,
    teacher_stride,
    base_scale,  # of the gradient: the term's weight and every divisor
    dist_scale,
    label_smoothing,
    inverse_tau,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    BASE: tl.constexpr,
    KIND: tl.constexpr,
    SOFT_TARGET: tl.constexpr,
):
    """A program owns one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < C
    dloss = tl.load(dloss_ptr + row * dloss_stride).to(tl.float32)
    statistics_row = statistics_ptr + row * STATISTICS
    dlogits = tl.zeros([BLOCK], tl.float32)
    ddist = tl.zeros([BLOCK], tl.float32)

    if BASE != "none" and dlogits_ptr is not None:
        z = tl.load(_row(logits_ptr, row, logits_stride, VECTOR) + col, inside, other=0.0).to(tl.float32)
        if SOFT_TARGET:
            t = tl.load(_row(target_ptr, row, target_stride, VECTOR) + col, inside, other=0.0).to(tl.float32)
            mass = tl.load(statistics_row + 2)
        else:
            label = tl.load(target_ptr + row * target_stride).to(tl.int64)
            t = tl.where(col == label, 1.0 - label_smoothing, 0.0) + label_smoothing / C
            mass = 1.0
        if BASE == "cross_entropy":
            dlogits = tl.exp((z - tl.load(statistics_row)) - tl.load(statistics_row + 1)) * mass - t
        else:
            dlogits = _sigmoid(z) - t
        if not SOFT_TARGET:
            dlogits = tl.where((label >= 0) & (label < C), dlogits, float("nan"))
        dlogits = tl.where(base_scale == 0.0, 0.0, dlogits * (dloss * base_scale))

    if KIND != "none":
        if dist_ptr is None:
            v = tl.load(_row(logits_ptr, row, logits_stride, VECTOR) + col, inside, other=0.0).to(tl.float32)
        else:
            v = tl.load(_row(dist_ptr, row, dist_stride, VECTOR) + col, inside, other=0.0).to(tl.float32)
        ddist = tl.exp((v - tl.load(statistics_row + 3)) * inverse_tau - tl.load(statistics_row + 4))
        if KIND == "soft":
            u = tl.load(_row(teacher_ptr, row, teacher_stride, VECTOR) + col, inside, other=0.0).to(tl.float32)
            ddist -= tl.exp((u - tl.load(statistics_row + 5)) * inverse_tau - tl.load(statistics_row + 6))
        else:
            teacher_label = tl.load(teacher_label_ptr + row)
            ddist = tl.where(teacher_label < 0, float("nan"), ddist - tl.where(col == teacher_label, 1.0, 0.0))
        ddist = tl.where(dist_scale == 0.0, 0.0, ddist * (dloss * dist_scale))

    if dist_ptr is None:
        dlogits += ddist
    elif ddist_ptr is not None:
        tl.store(ddist_ptr + row * C + col, ddist.to(ddist_ptr.dtype.element_ty), inside)
    if dlogits_ptr is not None:
        tl.store(dlogits_ptr + row * C + col, dlogits.to(dlogits_ptr.dtype.element_ty), inside)

"""LayerNorm and RMSNorm of the kept rows.

A line is what is normalized. A program works on a few lines of one row, whole where they fit into
registers (BLOCKS is 1: the loops over blocks and all but the first load of each element fall away),
else in several walks of blocks. See row_kernels.py for what holds here too.
"""

import triton
import triton.language as tl

from .row_kernels import rounded, row_number


@triton.jit
def _square_root(value):
    """Rounded to nearest: of float32, tl.sqrt is an approximation, and takes denormals for zero."""
    if value.dtype == tl.float32:
        return tl.sqrt_rn(value)
    else:
        return tl.sqrt(value)


@triton.jit(do_not_specialize=["index", "mean", "rstd", "rows", "kept_rows"])
def compact_norm_kernel(
    normed,
    kept,  # or None
    mean,  # [k * lines]; None for RMSNorm
    rstd,  # [k * lines]
    x,
    weight,  # [length] or None
    bias,  # [length] or None
    index,
    eps: tl.float64,
    rows: tl.int64,
    kept_rows: tl.int64,
    lines: tl.int64,
    length: tl.int64,
    x_row,
    x_line,
    BLOCKS: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """normed = norm(x[kept]), and the kept rows beside it. k reads, k writes (2k with `kept`)."""
    j = row_number()
    row = tl.load(index + j, mask=j < kept_rows, other=0)
    line = tl.program_id(0).to(tl.int64) * BLOCK_LINES + tl.arange(0, BLOCK_LINES)[:, None]
    exists = (line < lines) & (j < kept_rows)
    readable = exists & (row >= 0) & (row < rows)
    columns = tl.arange(0, BLOCK_LENGTH)[None, :].to(tl.int64)
    x += row * x_row + line * x_line
    count = length.to(ACC)
    center = tl.zeros((BLOCK_LINES, 1), ACC)
    statistic = j * lines + line
    if mean is not None:
        for start in range(0, BLOCKS * BLOCK_LENGTH, BLOCK_LENGTH):
            column = start + columns
            value = tl.load(x + column, readable & (column < length), other=0).to(ACC)
            center += tl.sum(value, 1, keep_dims=True)
        center = center / count
    square = tl.zeros((BLOCK_LINES, 1), ACC)
    for start in range(0, BLOCKS * BLOCK_LENGTH, BLOCK_LENGTH):
        column = start + columns
        inside = readable & (column < length)
        value = tl.load(x + column, inside, other=0).to(ACC)
        # An element that is not there has no distance to the mean.
        centered = tl.where(inside, value - center, 0)
        square += tl.sum(centered * centered, 1, keep_dims=True)
    inverse = 1 / _square_root(square / count + tl.full((), eps, ACC))
    normed += statistic * length
    if kept is not None:
        kept += statistic * length
    for start in range(0, BLOCKS * BLOCK_LENGTH, BLOCK_LENGTH):
        column = start + columns
        inside = exists & (column < length)
        raw = tl.load(x + column, readable & (column < length), other=0)
        value = (raw.to(ACC) - center) * inverse
        if weight is not None:
            value *= tl.load(weight + column, column < length, other=0).to(ACC)
        if bias is not None:
            value += tl.load(bias + column, column < length, other=0).to(ACC)
        tl.store(normed + column, rounded(value, normed.dtype.element_ty), inside)
        if kept is not None:
            tl.store(kept + column, raw, inside)
    # Last: with a store between them, the compiler could not join the loads of the same elements.
    tl.store(rstd + statistic, inverse, exists)
    if mean is not None:
        tl.store(mean + statistic, center, exists)
    tl.device_assert((row >= 0) & (row < rows), "rows.index: not a row of the batch")


@triton.jit(do_not_specialize=["slot", "mean", "rstd", "rows", "kept_rows"])
def compact_norm_backward_kernel(
    d_x,  # or None
    d_stream,  # or None
    d_normed,
    kept,
    mean,  # [k * lines]; None for RMSNorm
    rstd,  # [k * lines]
    weight,  # [length] or None
    weight_sums,  # [groups of rows, groups of lines, length] or None; BLOCKS is 1 with a sum
    bias_sums,  # likewise
    slot,
    rows: tl.int64,
    kept_rows: tl.int64,
    lines: tl.int64,
    length: tl.int64,
    stream_row,
    stream_line,
    GROUP: tl.constexpr,  # rows that one program adds up
    BLOCKS: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """d_x = d_stream, and d_x[kept] += the norm's gradient; and the partial sums of the gradients
    of weight and bias. B + 2k reads, B writes.
    """
    group = row_number()
    # Statistics are loaded in one dimension: as [BLOCK_LINES, 1] every thread would load them once
    # for each of its elements.
    flat = tl.program_id(0).to(tl.int64) * BLOCK_LINES + tl.arange(0, BLOCK_LINES)
    line = flat[:, None]
    exists = line < lines
    columns = tl.arange(0, BLOCK_LENGTH)[None, :].to(tl.int64)
    inverse_length = 1 / length.to(ACC)  # a division takes registers that the loop needs
    d_weight = tl.zeros((BLOCK_LINES, BLOCK_LENGTH), ACC)
    d_bias = tl.zeros((BLOCK_LINES, BLOCK_LENGTH), ACC)
    valid = group >= 0
    end = tl.minimum(group * GROUP + GROUP, rows)
    following = tl.load(slot + group * GROUP, mask=group * GROUP < end, other=-1)
    for row in range(group * GROUP, end):
        # What a row needs is on its way before anything waits: the next one's slot, on which all
        # addresses depend, and the stream's gradient, which every row has.
        j = following
        following = tl.load(slot + row + 1, mask=row + 1 < end, other=-1)
        valid = valid & (j >= -1) & (j < kept_rows)
        stream = row * stream_row + line * stream_line
        target = (row * lines + line) * length
        passed = tl.zeros((BLOCK_LINES, BLOCK_LENGTH), kept.dtype.element_ty)
        if d_x is not None and d_stream is not None and BLOCKS == 1:
            passed = tl.load(d_stream + stream + columns, exists & (columns < length), other=0)
        if (j >= 0) & (j < kept_rows):
            source = (j * lines + line) * length
            inverse = tl.load(rstd + j * lines + flat, flat < lines, other=0)[:, None]
            center = tl.zeros((BLOCK_LINES, 1), ACC)
            if mean is not None:
                center = tl.load(mean + j * lines + flat, flat < lines, other=0)[:, None]
            mean_d = tl.zeros((BLOCK_LINES, 1), ACC)
            mean_d_x_hat = tl.zeros((BLOCK_LINES, 1), ACC)
            for start in range(0, BLOCKS * BLOCK_LENGTH, BLOCK_LENGTH):
                column = start + columns
                inside = exists & (column < length)
                # Where there is no element, d and x_hat are zero, and so are all products:
                # (0 - center) * inverse can be infinite.
                d = tl.load(d_normed + source + column, inside, other=0).to(ACC)
                value = tl.load(kept + source + column, inside, other=0).to(ACC)
                x_hat = tl.where(inside, (value - center) * inverse, 0.0)
                if weight_sums is not None:
                    d_weight += d * x_hat
                if bias_sums is not None:
                    d_bias += d
                if d_x is not None:
                    if weight is not None:
                        d *= tl.load(weight + column, column < length, other=0).to(ACC)
                    mean_d_x_hat += tl.sum(d * x_hat, 1, keep_dims=True) * inverse_length
                    if mean is not None:
                        mean_d += tl.sum(d, 1, keep_dims=True) * inverse_length
            if d_x is not None:
                for start in range(0, BLOCKS * BLOCK_LENGTH, BLOCK_LENGTH):
                    column = start + columns
                    inside = exists & (column < length)
                    d = tl.load(d_normed + source + column, inside, other=0).to(ACC)
                    value = tl.load(kept + source + column, inside, other=0).to(ACC)
                    if weight is not None:
                        d *= tl.load(weight + column, column < length, other=0).to(ACC)
                    slope = inverse * mean_d_x_hat
                    value = inverse * (d - mean_d - (value - center) * slope)
                    if d_stream is not None:
                        if BLOCKS > 1:
                            passed = tl.load(d_stream + stream + column, inside, other=0)
                        value += passed.to(ACC)
                    tl.store(d_x + target + column, rounded(value, d_x.dtype.element_ty), inside)
        elif d_x is not None:
            for start in range(0, BLOCKS * BLOCK_LENGTH, BLOCK_LENGTH):
                column = start + columns
                inside = exists & (column < length)
                if d_stream is not None and BLOCKS > 1:
                    passed = tl.load(d_stream + stream + column, inside, other=0)
                # d_stream is of d_x's type: its bits pass, or zeros where there is none.
                tl.store(d_x + target + column, passed, inside)
    part = (group * tl.num_programs(0) + tl.program_id(0)) * length + columns
    # Where both dimensions of the grid are needed for the groups, some of them do not exist.
    inside = (columns < length) & (group * GROUP < rows)
    if weight_sums is not None:
        tl.store(weight_sums + part, tl.sum(d_weight, 0, keep_dims=True), inside)
    if bias_sums is not None:
        tl.store(bias_sums + part, tl.sum(d_bias, 0, keep_dims=True), inside)
    tl.device_assert(valid, "rows.slot: not a kept row")


@triton.jit(do_not_specialize=["mean", "rstd", "kept_lines"])
def norm_parameter_sums_kernel(
    weight_sums,  # [groups of lines, length] or None
    bias_sums,  # likewise
    d_normed,
    kept,
    mean,  # [k * lines]; None for RMSNorm
    rstd,  # [k * lines]
    kept_lines: tl.int64,
    length: tl.int64,
    GROUP: tl.constexpr,  # lines that one program adds up
    BLOCK_LENGTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """The same partial sums, of lines that are too long to be held: 2k reads more."""
    group = row_number()
    column = tl.program_id(0).to(tl.int64) * BLOCK_LENGTH + tl.arange(0, BLOCK_LENGTH)
    inside = column < length
    d_weight = tl.zeros((BLOCK_LENGTH,), ACC)
    d_bias = tl.zeros((BLOCK_LENGTH,), ACC)
    for line in range(group * GROUP, tl.minimum(group * GROUP + GROUP, kept_lines)):
        d = tl.load(d_normed + line * length + column, inside, other=0).to(ACC)
        if bias_sums is not None:
            d_bias += d
        if weight_sums is not None:
            value = tl.load(kept + line * length + column, inside, other=0).to(ACC)
            if mean is not None:
                value -= tl.load(mean + line)
            d_weight += d * (value * tl.load(rstd + line))
    inside = inside & (group * GROUP < kept_lines)
    if weight_sums is not None:
        tl.store(weight_sums + group * length + column, d_weight, inside)
    if bias_sums is not None:
        tl.store(bias_sums + group * length + column, d_bias, inside)

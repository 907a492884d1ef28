"""Kernels that treat the elements of a row one by one.

A program works on one tile of a row: program 0 counts the tiles, programs 1 and 2 the rows. Every
offset is computed in int64. Nothing is read or written at row numbers that lie outside of their
tensor, and they stop the kernel (device_assert): at its end, where no register has to outlive the
call.

Counts of rows and the arrays of row numbers are not specialized: their values change from step to
step, and would compile the kernel again.
"""

import triton
import triton.language as tl


@triton.jit
def row_number():
    return tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def _tile(lines, length, BLOCK_LINES: tl.constexpr, BLOCK_LENGTH: tl.constexpr):
    """This program's lines [BLOCK_LINES, 1], its elements [1, BLOCK_LENGTH], and which exist."""
    across = tl.cdiv(length, BLOCK_LENGTH).to(tl.int32)
    down = (tl.program_id(0) // across).to(tl.int64)
    right = (tl.program_id(0) % across).to(tl.int64)
    line = down * BLOCK_LINES + tl.arange(0, BLOCK_LINES)[:, None]
    element = right * BLOCK_LENGTH + tl.arange(0, BLOCK_LENGTH)[None, :]
    return line, element, (line < lines) & (element < length)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """The one rounding. From float64 to bfloat16 it goes by float32, as in PyTorch."""
    if value.dtype == tl.float64 and dtype == tl.bfloat16:
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit(do_not_specialize=["source_of", "rows", "sources"])
def copy_rows_kernel(
    y,  # rows of integers of the element's size
    x,
    base,  # [rows], or None: y's rows without a source are zero then
    source_of,  # [rows]: row of y -> row of x
    rows: tl.int64,
    sources: tl.int64,  # rows of x
    lines: tl.int64,
    length: tl.int64,
    y_row,
    y_line,
    y_element,
    x_row,
    x_line,
    x_element,
    base_row,
    base_line,
    base_element,
    NEGATIVE_ALLOWED: tl.constexpr,  # a row without a source
    BLOCK_LINES: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
):
    """y[r] = x[source_of[r]], and base[r] where that is -1."""
    row = row_number()
    line, element, inside = _tile(lines, length, BLOCK_LINES, BLOCK_LENGTH)
    inside = inside & (row < rows)
    source = tl.load(source_of + row, mask=row < rows, other=0)
    readable = inside & (source >= 0) & (source < sources)
    value = tl.load(x + source * x_row + line * x_line + element * x_element, readable, other=0)
    if base is not None:
        offset = row * base_row + line * base_line + element * base_element
        value = tl.where(source < 0, tl.load(base + offset, inside & (source < 0), other=0), value)
    tl.store(y + row * y_row + line * y_line + element * y_element, value, inside)
    valid = (source < sources) & (source >= (-1 if NEGATIVE_ALLOWED else 0))
    tl.device_assert(valid, "rows: not a row of the batch")


@triton.jit(do_not_specialize=["target_of", "rows", "targets"])
def place_rows_kernel(
    y,  # rows of integers of the element's size
    x,
    target_of,  # [rows]: row of x -> row of y
    rows: tl.int64,
    targets: tl.int64,  # rows of y
    lines: tl.int64,
    length: tl.int64,
    y_row,
    y_line,
    y_element,
    x_row,
    x_line,
    x_element,
    BLOCK_LINES: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
):
    """y[target_of[r]] = x[r]."""
    row = row_number()
    line, element, inside = _tile(lines, length, BLOCK_LINES, BLOCK_LENGTH)
    inside = inside & (row < rows)
    target = tl.load(target_of + row, mask=row < rows, other=0)
    valid = (target >= 0) & (target < targets)
    value = tl.load(x + row * x_row + line * x_line + element * x_element, inside, other=0)
    tl.store(y + target * y_row + line * y_line + element * y_element, value, inside & valid)
    tl.device_assert(valid, "rows: not a row of the batch")


@triton.jit
def _layer_scale(
    layer_scale,
    scale_line,
    scale_element,
    line,
    element,
    lines,
    length,
    PER_LINE: tl.constexpr,
    PER_ELEMENT: tl.constexpr,
    ACC: tl.constexpr,
):
    """The layer scale of a tile, read along the dimensions in which it differs only."""
    if PER_LINE and PER_ELEMENT:
        offset = line * scale_line + element * scale_element
        value = tl.load(layer_scale + offset, (line < lines) & (element < length), other=0)
    elif PER_LINE:
        value = tl.load(layer_scale + line * scale_line, line < lines, other=0)
    elif PER_ELEMENT:
        value = tl.load(layer_scale + element * scale_element, element < length, other=0)
    else:
        value = tl.load(layer_scale)
    return value.to(ACC)


@triton.jit(do_not_specialize=["row_weight", "rows_of", "rows", "others"])
def scatter_add_kernel(
    y,
    residual,
    out,
    layer_scale,  # or None
    row_weight,  # [k] or None
    rows_of,  # slot [rows], or in place index [rows]
    scale: tl.float64,
    rows: tl.int64,  # rows of y; in place, kept rows
    others: tl.int64,  # kept rows; in place, rows of y
    lines: tl.int64,
    length: tl.int64,
    y_row,
    y_line,
    y_element,
    residual_row,
    residual_line,
    residual_element,
    out_row,
    out_line,
    out_element,
    scale_line,
    scale_element,
    IN_PLACE: tl.constexpr,
    PER_LINE: tl.constexpr,
    PER_ELEMENT: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """y = residual, and y[kept] += scale * row_weight * layer_scale * out. B + k reads, B writes.

    In place y is residual, and only the kept rows are walked: 2k reads, k writes.
    """
    this = row_number()
    line, element, inside = _tile(lines, length, BLOCK_LINES, BLOCK_LENGTH)
    inside = inside & (this < rows)
    other = tl.load(rows_of + this, mask=this < rows, other=0)
    kept = (other >= 0) & (other < others)
    if IN_PLACE:
        row = other
        slot = this
        inside = inside & kept
    else:
        row = this
        slot = other
    y += row * y_row + line * y_line + element * y_element
    residual += row * residual_row + line * residual_line + element * residual_element
    value = tl.load(residual, inside, other=0)
    if kept:
        factor = tl.full((), scale, ACC)
        if row_weight is not None:
            factor = factor * tl.load(row_weight + slot, mask=this < rows, other=0).to(ACC)
        if layer_scale is not None:
            factor = factor * _layer_scale(
                layer_scale, scale_line, scale_element, line, element, lines, length,
                PER_LINE, PER_ELEMENT, ACC,
            )  # fmt: skip
        branch = out + slot * out_row + line * out_line + element * out_element
        added = factor * tl.load(branch, inside, other=0).to(ACC)
        tl.store(y, rounded(value.to(ACC) + added, y.dtype.element_ty), inside)
    else:
        # No arithmetic: the bits of a row of the same type pass, whatever they mean.
        tl.store(y, rounded(value, y.dtype.element_ty), inside)
    valid = ((other < others) & (other >= (0 if IN_PLACE else -1))) | (this >= rows)
    tl.device_assert(valid, "rows: not a row of the batch")


@triton.jit(do_not_specialize=["row_weight", "index", "rows", "kept_rows"])
def scatter_add_backward_kernel(
    d_out,
    grad,
    out,  # or None, where neither sum is wanted
    layer_scale,  # or None
    row_weight,  # [k] or None
    layer_scale_sums,  # [groups of rows, ..., elements of layer_scale] or None
    row_weight_sums,  # [k, tiles] or None
    index,
    scale: tl.float64,
    rows: tl.int64,
    kept_rows: tl.int64,
    lines: tl.int64,
    length: tl.int64,
    d_out_row,
    d_out_line,
    d_out_element,
    grad_row,
    grad_line,
    grad_element,
    out_row,
    out_line,
    out_element,
    scale_line,
    scale_element,
    scale_elements: tl.int64,
    PER_LINE: tl.constexpr,
    PER_ELEMENT: tl.constexpr,
    GROUP: tl.constexpr,  # kept rows that one program adds up
    BLOCK_LINES: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """d_out = scale * row_weight * layer_scale * grad[kept], and the partial sums of the gradients
    of layer_scale and row_weight. k reads (2k with a sum), k writes.
    """
    group = row_number()
    line, element, inside = _tile(lines, length, BLOCK_LINES, BLOCK_LENGTH)
    plain = tl.full((), scale, ACC)
    gamma = tl.full((), 1, ACC)
    if layer_scale is not None:
        gamma = _layer_scale(
            layer_scale, scale_line, scale_element, line, element, lines, length,
            PER_LINE, PER_ELEMENT, ACC,
        )  # fmt: skip
    grad += line * grad_line + element * grad_element
    d_out += line * d_out_line + element * d_out_element
    if out is not None:
        out += line * out_line + element * out_element
    sums = tl.zeros((BLOCK_LINES, BLOCK_LENGTH), ACC)
    valid = group >= 0
    for j in range(group * GROUP, tl.minimum(group * GROUP + GROUP, kept_rows)):
        row = tl.load(index + j)
        exists = (row >= 0) & (row < rows)
        valid = valid & exists
        weight = tl.full((), 1, ACC)
        if row_weight is not None:
            weight = tl.load(row_weight + j).to(ACC)
        scaled = plain * tl.load(grad + row * grad_row, inside & exists, other=0).to(ACC)
        product = scaled
        if out is not None:  # loaded before the store: behind it, it would wait for grad
            product = scaled * tl.load(out + j * out_row, inside, other=0).to(ACC)
        value = scaled * (weight * gamma)
        tl.store(d_out + j * d_out_row, rounded(value, d_out.dtype.element_ty), inside)
        if out is not None:
            if layer_scale_sums is not None:
                sums += weight * product
            if row_weight_sums is not None:
                total = tl.sum(tl.sum(gamma * product, 1), 0)
                tl.store(row_weight_sums + j * tl.num_programs(0) + tl.program_id(0), total)
    if layer_scale_sums is not None:
        # One partial sum for each group of rows, and for each tile in a dimension that is added up.
        part = group
        across = tl.cdiv(length, BLOCK_LENGTH).to(tl.int32)
        if not PER_LINE:
            sums = tl.sum(sums, 0, keep_dims=True)
            part = part * tl.cdiv(lines, BLOCK_LINES) + tl.program_id(0) // across
        if not PER_ELEMENT:
            sums = tl.sum(sums, 1, keep_dims=True)
            part = part * across + tl.program_id(0) % across
        target = layer_scale_sums + part * scale_elements
        # Where both dimensions of the grid are needed for the groups, some of them do not exist.
        exists = group * GROUP < kept_rows
        if PER_LINE and PER_ELEMENT:
            offset = line * scale_line + element * scale_element
            tl.store(target + offset, sums, inside & exists)
        elif PER_LINE:
            tl.store(target + line * scale_line, sums, (line < lines) & exists)
        elif PER_ELEMENT:
            tl.store(target + element * scale_element, sums, (element < length) & exists)
        else:
            tl.store(target + tl.zeros((1, 1), tl.int32), sums, exists)
    tl.device_assert(valid, "rows.index: not a row of the batch")


@triton.jit
def _line(length, BLOCK_LENGTH: tl.constexpr):
    """This program's elements of a row that is one line, the bytes of their bits, which exist."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_LENGTH
    element = start + tl.arange(0, BLOCK_LENGTH)
    byte = start // 8 + tl.arange(0, BLOCK_LENGTH // 8)
    return element, byte, element < length, byte < tl.cdiv(length, 8)


@triton.jit
def _relu(value, ACC: tl.constexpr):
    """A NaN passes, as in PyTorch. Of what passes no bit changes."""
    return tl.where(value.to(ACC) <= 0, 0.0, value)


@triton.jit
def _packed(flags, BLOCK_LENGTH: tl.constexpr):
    """Truth values as bits, eight a byte and the first in the lowest."""
    bits = flags.to(tl.int32) << (tl.arange(0, BLOCK_LENGTH) % 8)
    return tl.sum(tl.reshape(bits, (BLOCK_LENGTH // 8, 8)), 1).to(tl.uint8)


@triton.jit
def _unpacked(bits, BLOCK_LENGTH: tl.constexpr):
    """The inverse of _packed. A byte is read once, and not by each of its elements."""
    flags = (bits.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return tl.reshape(flags, (BLOCK_LENGTH,)) != 0


@triton.jit
def _times_scales(
    factor,
    row_weight,
    layer_scale,
    slot,
    element,
    length,
    PER_ELEMENT: tl.constexpr,
    ACC: tl.constexpr,
):
    """factor * row_weight * layer_scale, of a slot that exists and a row that is one line."""
    if row_weight is not None:
        factor = factor * tl.load(row_weight + slot).to(ACC)
    if layer_scale is not None:
        factor = factor * _layer_scale(
            layer_scale, 0, 1, 0, element, 1, length, False, PER_ELEMENT, ACC
        )
    return factor


@triton.jit(do_not_specialize=["row_weight", "slot_of", "rows", "kept_rows"])
def scatter_add_relu_kernel(
    y,  # like positive, its rows one behind the other
    positive,  # a bit for each element of y
    residual,
    out,
    layer_scale,  # [length], or one element, or None
    row_weight,  # [k] or None
    slot_of,  # [rows]
    scale: tl.float64,
    rows: tl.int64,
    kept_rows: tl.int64,
    length: tl.int64,
    residual_row,
    out_row,
    PER_ELEMENT: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """y = relu(what scatter_add_rows gives), and a bit where the gradient passes. B + k reads,
    B writes, and an eighth of a byte for each element.
    """
    row = row_number()
    element, byte, inside, has_bits = _line(length, BLOCK_LENGTH)
    exists = row < rows
    slot = tl.load(slot_of + row, mask=exists, other=-1)
    kept = (slot >= 0) & (slot < kept_rows)
    inside = inside & exists
    value = tl.load(residual + row * residual_row + element, inside, other=0)
    if kept:
        factor = _times_scales(
            tl.full((), scale, ACC), row_weight, layer_scale, slot, element, length,
            PER_ELEMENT, ACC,
        )  # fmt: skip
        added = factor * tl.load(out + slot * out_row + element, inside, other=0).to(ACC)
        result = rounded(_relu(value.to(ACC) + added, ACC), y.dtype.element_ty)
    else:
        result = rounded(_relu(value, ACC), y.dtype.element_ty)
    tl.store(y + row * length + element, result, inside)
    # Of what is stored: a positive sum may have been rounded to zero. No element, no bit.
    passes = tl.where(result.to(ACC) <= 0, 0, inside.to(tl.int32))
    positive += row * tl.cdiv(length, 8) + byte
    tl.store(positive, _packed(passes, BLOCK_LENGTH), has_bits & exists)
    tl.device_assert((slot >= -1) & (slot < kept_rows), "rows: not a row of the batch")


@triton.jit(do_not_specialize=["row_weight", "slot_of", "rows", "kept_rows"])
def scatter_add_relu_backward_kernel(
    d_residual,  # like d_out and positive, its rows one behind the other
    d_out,  # or None, where it is not wanted
    grad,
    positive,  # a bit for each element of grad
    layer_scale,  # [length], or one element, or None
    row_weight,  # [k] or None
    slot_of,  # [rows]
    scale: tl.float64,
    rows: tl.int64,
    kept_rows: tl.int64,
    length: tl.int64,
    grad_row,
    PER_ELEMENT: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """d_residual = grad where its bit is set, else zero; d_out = scale * row_weight * layer_scale *
    d_residual[kept]. B reads, B + k writes, and an eighth of a byte for each element.
    """
    row = row_number()
    element, byte, inside, has_bits = _line(length, BLOCK_LENGTH)
    exists = row < rows
    slot = tl.load(slot_of + row, mask=exists, other=-1)
    inside = inside & exists
    positive += row * tl.cdiv(length, 8) + byte
    passes = _unpacked(tl.load(positive, has_bits & exists, other=0), BLOCK_LENGTH)
    value = tl.load(grad + row * grad_row + element, inside, other=0)
    value = tl.where(passes, value, 0.0)
    tl.store(d_residual + row * length + element, value, inside)
    if d_out is not None:
        kept = (slot >= 0) & (slot < kept_rows)
        if kept:
            factor = _times_scales(
                tl.full((), 1, ACC), row_weight, layer_scale, slot, element, length,
                PER_ELEMENT, ACC,
            )  # fmt: skip
            # In the order of scatter_add_backward_kernel: the same bits.
            scaled = tl.full((), scale, ACC) * value.to(ACC) * factor
            tl.store(
                d_out + slot * length + element, rounded(scaled, d_out.dtype.element_ty), inside
            )
    tl.device_assert((slot >= -1) & (slot < kept_rows), "rows: not a row of the batch")

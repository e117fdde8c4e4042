"""The kernels of ``kernels`` for a GPU, in Triton: each pass reads the logits once, and computes in fp32.

Bytes per token, for V columns of e bytes: statistics read V e of each model and write 32 bytes (KL), 8 (mixture) or 12 (one
model); a gradient reads V e of each model and writes V e, over the logits if asked to. Excluded columns add a mask of V
bytes, which all tokens share, and chosen columns 8 bytes each.

Sums: one program a row, one sum per lane of a block, rescaled when a maximum grows and joined once at the end. Which lane a
column falls to depends on BLOCK, so BLOCK is a function of the width alone: the order of every sum is fixed, and
results are the same to the bit from run to run. Gradients have no sums.

``exp`` and ``where`` stand for the approximate exponential of the hardware (2e-7) and a select. The logarithm near 1, which
mixtures of nearly equal models hang on, is a polynomial.
"""

import triton
import triton.language as tl


@triton.jit
def _weighted(weight, value):
    """``weight * value`` with 0 * inf = 0."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def _or_zero(maximum):
    """A maximum to subtract: 0 where nothing was possible."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def _log_near(y, correction):
    """log(y + correction), the correction being of the size of y's rounding; -inf for y = 0, NaN stays."""
    bits = y.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    scale = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0 + correction * scale
    p = f * 0.0870043486 - 0.142674863
    p = p * f + 0.149147689
    p = p * f - 0.16577585
    p = p * f + 0.199630633
    p = p * f - 0.250013381
    p = p * f + 0.333339095
    result = f + (f * f) * (p * f - 0.5) + exponent.to(tl.float32) * 0.693147181
    result = tl.where(y == 0, -float("inf"), result)
    return tl.where(y == y, result, y)


@triton.jit
def _log_share(share, excess):
    """log(share), share = 1 + excess, by whichever of the two is precise."""
    near = excess + 1.0
    small = share < 0.5
    return _log_near(tl.where(small, share, near), tl.where(small, 0.0, excess - (near - 1.0)))


@triton.jit
def _read(row, start, num_columns, other, BLOCK: tl.constexpr):
    """A block of a row; ``other`` outside. Under a mask of any width but a multiple of 16 loads would be of single columns."""
    columns = start + tl.arange(0, BLOCK)
    if start + BLOCK <= num_columns:
        values = tl.load(row + columns)
    else:
        values = tl.load(row + columns, mask=columns < num_columns, other=other)
    return values


@triton.jit
def _write(row, values, start, num_columns, BLOCK: tl.constexpr):
    """A block of a row, likewise, in the row's dtype."""
    columns = start + tl.arange(0, BLOCK)
    values = values.to(row.dtype.element_ty)
    if start + BLOCK <= num_columns:
        tl.store(row + columns, values)
    else:
        tl.store(row + columns, values, mask=columns < num_columns)


@triton.jit
def _load(row, start, num_columns, scale, BLOCK: tl.constexpr):
    """A block of one row's logits in fp32, over the temperature; -inf outside."""
    return _read(row, start, num_columns, -float("inf"), BLOCK).to(tl.float32) * scale


@triton.jit
def _log_prob(row, start, num_columns, scale, normalisers, max_at, log_at, BLOCK: tl.constexpr):
    """log-probabilities of a block: maximum and logarithm are subtracted one after the other."""
    values = _load(row, start, num_columns, scale, BLOCK)
    return values - tl.load(normalisers + max_at) - tl.load(normalisers + log_at)


@triton.jit
def kl_statistics(
    out, z, t, excluded, z_stride, t_stride, num_columns, scale, EXCLUDES: tl.constexpr, BLOCK: tl.constexpr
):
    """See ``kernels.kl_statistics``."""
    row = tl.program_id(0).to(tl.int64)
    max_z = -float("inf")
    max_t = -float("inf")
    sum_z = tl.zeros([BLOCK], tl.float32)
    sum_t = tl.zeros([BLOCK], tl.float32)
    gap_z = tl.zeros([BLOCK], tl.float32)
    gap_t = tl.zeros([BLOCK], tl.float32)
    self_z = tl.zeros([BLOCK], tl.float32)
    self_t = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        x = _load(z + row * z_stride, start, num_columns, scale, BLOCK)
        y = _load(t + row * t_stride, start, num_columns, scale, BLOCK)
        if EXCLUDES:
            blocked = _read(excluded, start, num_columns, 0, BLOCK) != 0
            x = tl.where(blocked, -float("inf"), x)
            y = tl.where(blocked, -float("inf"), y)
        new_z = tl.maximum(max_z, tl.max(x, 0))
        new_t = tl.maximum(max_t, tl.max(y, 0))
        if (new_z > max_z) | (new_t > max_t):
            # Nothing was possible before: sums are 0 (or already infinite), and stay so by a shift of 0.
            da = tl.where(max_z == -float("inf"), 0.0, max_z - new_z)
            db = tl.where(max_t == -float("inf"), 0.0, max_t - new_t)
            scale_z = tl.exp(da)
            scale_t = tl.exp(db)
            gap_z = _weighted(scale_z, gap_z + _weighted(sum_z, da - db))
            gap_t = _weighted(scale_t, gap_t + _weighted(sum_t, db - da))
            self_z = _weighted(scale_z, self_z + _weighted(sum_z, da))
            self_t = _weighted(scale_t, self_t + _weighted(sum_t, db))
            sum_z *= scale_z
            sum_t *= scale_t
            max_z = new_z
            max_t = new_t
        a = x - _or_zero(max_z)
        b = y - _or_zero(max_t)
        exp_a = tl.exp(a)
        exp_b = tl.exp(b)
        sum_z += exp_a
        sum_t += exp_b
        gap_z += _weighted(exp_a, a - b)
        gap_t += _weighted(exp_b, b - a)
        self_z += _weighted(exp_a, a)
        self_t += _weighted(exp_b, b)
    to = out + row * 8
    tl.store(to, max_z)
    tl.store(to + 1, tl.sum(sum_z, 0))
    tl.store(to + 2, max_t)
    tl.store(to + 3, tl.sum(sum_t, 0))
    tl.store(to + 4, tl.sum(gap_z, 0))
    tl.store(to + 5, tl.sum(gap_t, 0))
    tl.store(to + 6, tl.sum(self_z, 0))
    tl.store(to + 7, tl.sum(self_t, 0))


@triton.jit
def kl_gradient(
    out,
    z,
    t,
    normalisers,
    weight,
    upstream,
    out_stride,
    z_stride,
    t_stride,
    num_columns,
    scale,
    BLOCK: tl.constexpr,
):
    """See ``kernels.kl_gradient_``."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    log_q = _log_prob(z + row * z_stride, start, num_columns, scale, normalisers + row * 5, 0, 1, BLOCK)
    log_p = _log_prob(t + row * t_stride, start, num_columns, scale, normalisers + row * 5, 2, 3, BLOCK)
    w = tl.load(weight + row)
    u = tl.load(upstream + row) * scale  # 0 for a token that does not count, whose KL may be infinite
    q = tl.exp(log_q)
    p = tl.exp(log_p)
    reverse = _weighted(u * w * q, log_q - log_p - tl.load(normalisers + row * 5 + 4))
    grad = (q - p) * (u * (1 - w)) + reverse
    _write(out + row * out_stride, grad, start, num_columns, BLOCK)


# Probabilities of a mixture are scaled by 2^60, exactly, so that it is never denormal.
_LIFT: tl.constexpr = tl.constexpr(2.0**60)


@triton.jit
def mixture_statistics(
    out,
    z,
    t,
    excluded,
    normalisers,
    z_stride,
    t_stride,
    num_columns,
    scale,
    p_weight,
    q_weight,
    p_share,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See ``kernels.mixture_statistics``."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    slopes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        log_q = _log_prob(z + row * z_stride, start, num_columns, scale, normalisers + row * 5, 0, 1, BLOCK)
        log_p = _log_prob(t + row * t_stride, start, num_columns, scale, normalisers + row * 5, 2, 3, BLOCK)
        if EXCLUDES:
            blocked = _read(excluded, start, num_columns, 0, BLOCK) != 0
            log_q = tl.where(blocked, -float("inf"), log_q)
            log_p = tl.where(blocked, -float("inf"), log_p)
        q = tl.exp(log_q) * _LIFT
        p = tl.exp(log_p) * _LIFT
        per_m = 1.0 / (p_share * p + (1 - p_share) * q)
        gap = (p - q) * per_m
        share_q = q * per_m
        share_p = p * per_m
        log_share_q = _log_share(share_q, -p_share * gap)
        term = p_weight * _weighted(p, _log_share(share_p, (1 - p_share) * gap))
        term += q_weight * _weighted(q, log_share_q)
        term += (q_weight * p_share - p_weight * (1 - p_share)) * (p - q)
        slope = q_weight * (log_share_q + 1) - (1 - p_share) * (p_weight * share_p + q_weight * share_q)
        total += term
        slopes += _weighted(q, slope)
    tl.store(out + row * 2, tl.sum(total, 0) / _LIFT)
    tl.store(out + row * 2 + 1, tl.sum(slopes, 0) / _LIFT)


@triton.jit
def mixture_gradient(
    out,
    z,
    t,
    normalisers,
    mean_slope,
    upstream,
    out_stride,
    z_stride,
    t_stride,
    num_columns,
    scale,
    p_weight,
    q_weight,
    p_share,
    BLOCK: tl.constexpr,
):
    """See ``kernels.mixture_gradient_``."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    log_q = _log_prob(z + row * z_stride, start, num_columns, scale, normalisers + row * 5, 0, 1, BLOCK)
    log_p = _log_prob(t + row * t_stride, start, num_columns, scale, normalisers + row * 5, 2, 3, BLOCK)
    q = tl.exp(log_q) * _LIFT
    p = tl.exp(log_p) * _LIFT
    per_m = 1.0 / (p_share * p + (1 - p_share) * q)
    share_q = q * per_m
    log_share_q = _log_share(share_q, -p_share * ((p - q) * per_m))
    slope = q_weight * (log_share_q + 1) - (1 - p_share) * (p_weight * (p * per_m) + q_weight * share_q)
    grad = _weighted(q / _LIFT, slope - tl.load(mean_slope + row)) * (tl.load(upstream + row) * scale)
    _write(out + row * out_stride, grad, start, num_columns, BLOCK)


@triton.jit
def softmax_statistics(
    out, z, chosen, z_stride, chosen_stride, num_columns, scale, EXCLUDES: tl.constexpr, BLOCK: tl.constexpr
):
    """See ``kernels.rest_statistics``; ``chosen`` is ascending in every row and ends with ``num_columns``."""
    row = tl.program_id(0).to(tl.int64)
    max_z = -float("inf")
    sum_z = tl.zeros([BLOCK], tl.float32)
    self_z = tl.zeros([BLOCK], tl.float32)
    place = chosen + row * chosen_stride
    for start in range(0, num_columns, BLOCK):
        x = _load(z + row * z_stride, start, num_columns, scale, BLOCK)
        if EXCLUDES:
            columns = start + tl.arange(0, BLOCK)
            stop = tl.minimum(start + BLOCK, num_columns)
            column = tl.load(place)
            while column < stop:
                x = tl.where(columns == column, -float("inf"), x)
                place += 1
                column = tl.load(place)
        new_z = tl.maximum(max_z, tl.max(x, 0))
        if new_z > max_z:
            shift = tl.where(max_z == -float("inf"), 0.0, max_z - new_z)
            self_z = _weighted(tl.exp(shift), self_z + _weighted(sum_z, shift))
            sum_z *= tl.exp(shift)
            max_z = new_z
        a = x - _or_zero(max_z)
        exp_a = tl.exp(a)
        sum_z += exp_a
        self_z += _weighted(exp_a, a)
    tl.store(out + row * 3, max_z)
    tl.store(out + row * 3 + 1, tl.sum(sum_z, 0))
    tl.store(out + row * 3 + 2, tl.sum(self_z, 0))


@triton.jit
def softmax_gradient(
    out,
    z,
    normalisers,
    upstream,
    entropy_upstream,
    entropy,
    out_stride,
    z_stride,
    num_columns,
    scale,
    BLOCK: tl.constexpr,
):
    """See ``kernels.softmax_gradient_``."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    log_q = _log_prob(z + row * z_stride, start, num_columns, scale, normalisers + row * 2, 0, 1, BLOCK)
    q = tl.exp(log_q)
    spread = _weighted(q, log_q + tl.load(entropy + row))
    grad = scale * (tl.load(upstream + row) * q - _weighted(tl.load(entropy_upstream + row), spread))
    _write(out + row * out_stride, grad, start, num_columns, BLOCK)


@triton.jit
def rest_gradient(out, z, rest, upstream, out_stride, z_stride, num_columns, scale, BLOCK: tl.constexpr):
    """See ``kernels.rest_gradient_``; the chosen columns are ``chosen_gradient``'s."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    log_q = _log_prob(z + row * z_stride, start, num_columns, scale, rest + row * 3, 0, 1, BLOCK)
    factor = tl.load(rest + row * 3 + 2) * (tl.load(upstream + row) * scale)
    _write(out + row * out_stride, tl.exp(log_q) * factor, start, num_columns, BLOCK)


@triton.jit
def chosen_gradient(
    out, chosen, chosen_grad, upstream, out_stride, num_columns, num_chosen, scale, BLOCK: tl.constexpr
):
    """Write the chosen columns' own gradients, where this rank holds the column."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, BLOCK)
    exists = slots < num_chosen
    columns = tl.load(chosen + row * num_chosen + slots, mask=exists, other=num_columns)
    grad = tl.load(chosen_grad + row * num_chosen + slots, mask=exists, other=0.0)
    grad = grad * (tl.load(upstream + row) * scale)
    tl.store(out + row * out_stride + columns, grad.to(out.dtype.element_ty), mask=columns < num_columns)

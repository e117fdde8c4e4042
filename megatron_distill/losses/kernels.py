"""The arithmetic over a token's vocabulary, written as functions of tensors: what every backend must compute.

``kl_statistics`` reads both models' logits once and leaves eight numbers per token; ``merge_statistics`` joins those of
several shards; ``kl_gradient_`` turns logits and global normalisers into the gradient, column by column. ``mixture_...``,
``softmax_...`` and ``rest_...`` are the same pair for the mixtures, for one model alone, and for one model without chosen
columns. ``backends`` says who runs them.

Eager, they are run on chunks of tokens, since each operation writes its result to memory; operations in place are there
because fresh memory costs more than arithmetic on a CPU. Through Inductor a chunk's intermediates stay in registers and
the whole batch is one chunk.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Bytes of one fp32 intermediate of an eager chunk. A CPU works fastest while a handful of them fit its cache; a GPU needs
# chunks large enough to hide launches.
_CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float64 stays (for gradient checks); everything else is computed in float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def default_chunk_tokens(num_columns: int, device: torch.device) -> int:
    """Tokens per eager chunk, so that one intermediate stays within the device's budget."""
    return max(1, _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"]) // (4 * max(1, num_columns)))


@cache
def compiled_kernel(kernel: Callable) -> Callable:
    """``kernel`` through Inductor: compiled at its first call (seconds), and again for another width or dtype.

    The number of tokens is left open, the number of columns is not: loops over columns of a known length vectorise best.
    """
    inner = torch.compile(kernel)

    def call(*arguments: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.dim():
                for dim in range(argument.dim()):
                    mark = (
                        torch._dynamo.mark_static
                        if dim or argument.dtype == torch.bool
                        else torch._dynamo.maybe_mark_dynamic
                    )
                    mark(argument, dim)
        return inner(*arguments)

    return call


def finite_or_zero(maximum: Tensor) -> Tensor:
    """A maximum to subtract: 0 for an empty or fully masked row, where -inf would give -inf - -inf = NaN."""
    return torch.where(maximum == -torch.inf, 0.0, maximum)


def readable(tensor: Tensor) -> Tensor:
    """With columns side by side, as compiled kernels walk them."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def floats(tensor: Tensor) -> Tensor:
    """In fp32, without gaps."""
    return tensor.to(torch.float32).contiguous()


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """``weights * values`` with 0 * inf = 0, so that impossible tokens cost nothing; NaN weights stay NaN."""
    return torch.where(weights == 0, 0.0, weights * values)


def kl_statistics(z_TV: Tensor, t_TV: Tensor, excluded_V: Tensor | None, inverse_temperature: float) -> Tensor:
    """Summarise both models' logits over the columns of one shard.

    With a = z - max z and b = t - max t, the eight numbers of a token are

        max z,  sum e^a,  max t,  sum e^b,  sum e^a (a - b),  sum e^b (b - a),  sum e^a a,  sum e^b b

    from which, once merged over shards, follow both log-normalisers, both KLs and both entropies. The differences are
    summed as differences of *centred* logits: the textbook sum e^a (z - t) loses the KL to rounding as soon as the two
    models' logits sit at different offsets.

    Args:
        z_TV, t_TV: ``[T, V]`` logits of the student and the teacher for the same columns.
        excluded_V: ``[V]`` bool columns to leave out, or None.
        inverse_temperature: 1 / temperature, applied to both.

    Returns:
        ``[T, 8]`` in the compute dtype.
    """
    dtype = compute_dtype(z_TV)
    z, t = z_TV.to(dtype) * inverse_temperature, t_TV.to(dtype) * inverse_temperature
    if excluded_V is not None:
        z, t = z.masked_fill_(excluded_V, -torch.inf), t.masked_fill_(excluded_V, -torch.inf)
    max_z, max_t = z.amax(dim=1, keepdim=True), t.amax(dim=1, keepdim=True)
    a, b = z.sub_(finite_or_zero(max_z)), t.sub_(finite_or_zero(max_t))
    exp_a, exp_b = a.exp(), b.exp()
    # Masked rather than by `nansum`: compiled, the latter was measured to take three times as long.
    return torch.stack(
        [
            max_z.squeeze(1),
            exp_a.sum(dim=1),
            max_t.squeeze(1),
            exp_b.sum(dim=1),
            weighted(exp_a, a - b).sum(dim=1),
            weighted(exp_b, b - a).sum(dim=1),
            weighted(exp_a, a).sum(dim=1),
            weighted(exp_b, b).sum(dim=1),
        ],
        dim=1,
    )


def merge_statistics(stats_RTS: Tensor) -> Tensor:
    """Join the statistics of R shards into those of their union, ``[T, 8]``.

    Rescaling shard r from its own maxima to the common ones shifts a by da = max_r z - max z (and b by db), so

        sum e^a (a - b)  ->  e^da (sum e^a (a - b) + (da - db) sum e^a).
    """
    max_z_RT, sum_z, max_t_RT, sum_t, z_gap, t_gap, z_self, t_self = stats_RTS.unbind(dim=2)
    max_z, max_t = max_z_RT.amax(dim=0), max_t_RT.amax(dim=0)
    da, db = max_z_RT - finite_or_zero(max_z), max_t_RT - finite_or_zero(max_t)
    scale_z, scale_t = da.exp(), db.exp()

    def rescaled(scale: Tensor, mass: Tensor, inner: Tensor, shift: Tensor) -> Tensor:
        moved = weighted(mass, shift) + inner
        return weighted(scale, moved).sum(dim=0)

    return torch.stack(
        [
            max_z,
            (scale_z * sum_z).sum(dim=0),
            max_t,
            (scale_t * sum_t).sum(dim=0),
            rescaled(scale_z, sum_z, z_gap, da - db),
            rescaled(scale_t, sum_t, t_gap, db - da),
            rescaled(scale_z, sum_z, z_self, da),
            rescaled(scale_t, sum_t, t_self, db),
        ],
        dim=1,
    )


def kl_gradient_(
    out_TV: Tensor,
    z_TV: Tensor,
    t_TV: Tensor,
    normalisers_T5: Tensor,
    weight_T: Tensor,
    upstream_T: Tensor,
    inverse_temperature: float,
) -> None:
    """Write d loss / d z for the columns of one shard into ``out_TV``, which may be ``z_TV`` itself.

        upstream / temperature * (w q ((log q - log p) - KL(q||p)) + (1 - w) (q - p))

    Elementwise given the normalisers: no sum over the vocabulary, hence no collective.

    Args:
        out_TV: ``[T, V]``, written.
        z_TV, t_TV: ``[T, V]`` logits of the student and the teacher.
        normalisers_T5: ``[T, 5]``: max z, log sum e^a, max t, log sum e^b, KL(q||p). Maximum and logarithm are kept apart
            because their sum would round away the logarithm where logits are in the thousands.
        weight_T: ``[T]``, the reverse-KL weight w.
        upstream_T: ``[T]``, the gradient that reached the token's loss.
        inverse_temperature: 1 / temperature.
    """
    log_q, log_p = log_probs(z_TV, t_TV, normalisers_T5, inverse_temperature)
    scale = (upstream_T * inverse_temperature).unsqueeze(1)
    to_reverse = scale * weight_T.unsqueeze(1)  # 0 for a token that does not count, whose KL may be infinite
    q, p = log_q.exp(), log_p.exp()
    reverse = weighted(to_reverse * q, log_q.sub_(log_p).sub_(normalisers_T5[:, 4:]))
    out_TV.copy_(q.sub_(p).mul_(scale - to_reverse).add_(reverse))


def softmax_statistics(z_TV: Tensor, inverse_temperature: float) -> Tensor:
    """max z, sum e^a and sum e^a a of every token, with a = z - max z: ``[T, 3]``; one model's part of ``kl_statistics``."""
    z = z_TV.to(compute_dtype(z_TV)) * inverse_temperature
    max_z = z.amax(dim=1, keepdim=True)
    a = z - finite_or_zero(max_z)
    exp_a = a.exp()
    return torch.stack([max_z.squeeze(1), exp_a.sum(dim=1), weighted(exp_a, a).sum(dim=1)], dim=1)


def merge_softmax_statistics(stats_RTS: Tensor) -> Tensor:
    """Join the ``softmax_statistics`` of R shards into those of their union, ``[T, 3]``."""
    max_RT, mass, inner = stats_RTS.unbind(dim=2)
    maximum = max_RT.amax(dim=0)
    shift = max_RT - finite_or_zero(maximum)
    scale = shift.exp()
    total = weighted(scale, weighted(mass, shift) + inner).sum(dim=0)
    return torch.stack([maximum, (scale * mass).sum(dim=0), total], dim=1)


def softmax_gradient_(
    out_TV: Tensor,
    z_TV: Tensor,
    normalisers_T2: Tensor,
    upstream_T: Tensor,
    entropy_upstream_T: Tensor,
    entropy_T: Tensor,
    inverse_temperature: float,
) -> None:
    """Write ``(upstream q - entropy_upstream q (log q + H)) / temperature`` into ``out_TV``, which may be ``z_TV`` itself.

    The first term is the gradient of upstream times the log-sum-exp, the second that of entropy_upstream times H(q).

    Args:
        out_TV: ``[T, V]``, written.
        z_TV: ``[T, V]`` logits.
        normalisers_T2: ``[T, 2]``: max z and log sum e^a.
        upstream_T, entropy_upstream_T: ``[T]``.
        entropy_T: ``[T]``, H(q) in nats.
        inverse_temperature: 1 / temperature.
    """
    max_z, log_z = normalisers_T2.unsqueeze(2).unbind(dim=1)
    log_q = z_TV.to(compute_dtype(z_TV)) * inverse_temperature - max_z - log_z
    q = log_q.exp()
    spread = weighted(q, log_q + entropy_T.unsqueeze(1))
    grad = upstream_T.unsqueeze(1) * q - weighted(entropy_upstream_T.unsqueeze(1), spread)
    out_TV.copy_(inverse_temperature * grad)


def rest_statistics(z_TV: Tensor, columns_TN: Tensor, inverse_temperature: float) -> Tensor:
    """``softmax_statistics`` of the columns that are not chosen.

    They are summed by themselves. Subtracting the chosen columns' mass from the total instead would leave rounding noise
    in place of a tail of 1e-6, which is what a confident model has.

    Args:
        z_TV: ``[T, V]`` logits.
        columns_TN: ``[T, N]`` int64 columns to leave out; V for none.
        inverse_temperature: 1 / temperature.

    Returns:
        ``[T, 3]``.
    """
    return softmax_statistics(without_columns(z_TV, columns_TN), inverse_temperature)


def without_columns(z_TV: Tensor, columns_TN: Tensor) -> Tensor:
    """A copy of the logits with -inf in the chosen columns; V chooses none."""
    num_columns = z_TV.shape[1]
    blocked = torch.where(columns_TN < num_columns, -torch.inf, torch.inf).to(z_TV.dtype)
    # The least of the logit and +inf is the logit, so slots without a column may point at any.
    return z_TV.scatter_reduce(1, columns_TN.clamp(max=num_columns - 1), blocked, "amin")


def compiled_rest_statistics(z_TV: Tensor, columns_TN: Tensor, inverse_temperature: float) -> Tensor:
    """``rest_statistics``, compiled but for the scatter."""
    return compiled_kernel(softmax_statistics)(without_columns(z_TV, columns_TN), inverse_temperature)


def rest_gradient_(
    out_TV: Tensor,
    z_TV: Tensor,
    columns_TN: Tensor,
    chosen_grad_TN: Tensor,
    rest_T3: Tensor,
    upstream_T: Tensor,
    inverse_temperature: float,
) -> None:
    """Write the gradient of what is made of chosen columns and the log-sum-exp of the rest into ``out_TV``.

        upstream / temperature * (rest_grad e^(z - max) / sum, or chosen_grad in the chosen columns)

    Args:
        out_TV: ``[T, V]``, written.
        z_TV: ``[T, V]`` logits.
        columns_TN: ``[T, N]`` as in ``rest_statistics``; distinct per token, but for V.
        chosen_grad_TN: ``[T, N]``, the gradient to each chosen logit.
        rest_T3: ``[T, 3]``: the rest's max z, log sum e^a, and the gradient to its log-sum-exp.
        upstream_T: ``[T]``.
        inverse_temperature: 1 / temperature.
    """
    rest_max, rest_log, rest_grad = rest_T3.unsqueeze(2).unbind(dim=1)
    scale_T1 = (upstream_T * inverse_temperature).unsqueeze(1)
    z = z_TV.to(compute_dtype(z_TV)) * inverse_temperature
    out_TV.copy_(z.sub_(rest_max).sub_(rest_log).exp_().mul_(rest_grad * scale_T1))
    here_TN = columns_TN < z_TV.shape[1]
    # A slot without a column repeats one that has, value and all, so that no two writes differ.
    first_T1 = here_TN.to(torch.int8).argmax(dim=1, keepdim=True)
    columns = torch.where(here_TN, columns_TN, columns_TN.gather(1, first_T1)).clamp(max=z_TV.shape[1] - 1)
    values = torch.where(here_TN, chosen_grad_TN, chosen_grad_TN.gather(1, first_T1)) * scale_T1
    any_T1 = here_TN.any(dim=1, keepdim=True)
    out_TV.scatter_(1, columns, torch.where(any_T1, values.to(out_TV.dtype), out_TV[:, -1:]))


class Mixture(NamedTuple):
    """``p_weight KL(p || m) + q_weight KL(q || m)`` with the mixture ``m = p_share p + (1 - p_share) q``.

    Every divergence of the skew and Jensen-Shannon family is one choice of the three numbers; ``mixture`` names them.
    """

    p_weight: float
    q_weight: float
    p_share: float


def log_share(share: Tensor, excess: Tensor) -> Tensor:
    """log(share) of a probability's share in a mixture, ``share = 1 + excess``, by whichever of the two is precise.

    Where the models agree the share is near 1 and log1p of the excess keeps what share has rounded away: for nearly equal
    models a thousand times more accurate than a difference of logarithms, and bounded. Where the share is small the
    excess has cancelled, and the share itself is precise.
    """
    return torch.where(share < 0.5, share.log(), excess.log1p())


def mixture_terms(log_q: Tensor, log_p: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Each column's term of the divergence, and its derivative with respect to the column's q.

    With g = (p - q) / m, q / m = 1 - p_share g and p / m = 1 + (1 - p_share) g: see ``log_share``.

    term = p_weight (p log(p / m) + m - p) + q_weight (q log(q / m) + m - q)
    d/dq = q_weight (log(q / m) + 1) - (1 - p_share) (p_weight p + q_weight q) / m

    What is added to the definition sums to 0 over the vocabulary (and is left out of d/dq): it takes from each term what is
    of first order in g, so that nearly equal models are not lost in the rounding of terms that cancel.
    """
    p_weight, q_weight, p_share = mixture
    q, p = log_q.exp(), log_p.exp()
    m = p_share * p + (1 - p_share) * q
    gap = (p - q) / m
    log_share_q, log_share_p = log_share(q / m, -p_share * gap), log_share(p / m, (1 - p_share) * gap)
    first_order = (q_weight * p_share - p_weight * (1 - p_share)) * (p - q)
    term = p_weight * weighted(p, log_share_p) + q_weight * weighted(q, log_share_q) + first_order
    slope = q_weight * (log_share_q + 1) - (1 - p_share) * (p_weight * p + q_weight * q) / m
    return term, slope


def log_probs(z_TV: Tensor, t_TV: Tensor, normalisers_T5: Tensor, inverse_temperature: float) -> tuple[Tensor, Tensor]:
    """log q and log p of the columns, from the logits and the normalisers of ``kl_gradient_``."""
    dtype = compute_dtype(z_TV)
    max_z, log_z, max_t, log_t, _ = normalisers_T5.unsqueeze(2).unbind(dim=1)
    return (
        (z_TV.to(dtype) * inverse_temperature).sub_(max_z).sub_(log_z),
        (t_TV.to(dtype) * inverse_temperature).sub_(max_t).sub_(log_t),
    )


def mixture_statistics(
    z_TV: Tensor,
    t_TV: Tensor,
    excluded_V: Tensor | None,
    normalisers_T5: Tensor,
    mixture: Mixture,
    inverse_temperature: float,
) -> Tensor:
    """The divergence over the columns of one shard, and sum q d/dq, which centres its gradient: ``[T, 2]``, to be added up."""
    log_q, log_p = log_probs(z_TV, t_TV, normalisers_T5, inverse_temperature)
    if excluded_V is not None:
        log_q, log_p = log_q.masked_fill(excluded_V, -torch.inf), log_p.masked_fill(excluded_V, -torch.inf)
    term, slope = mixture_terms(log_q, log_p, mixture)
    # Where both are ruled out the mixture is too, and the term is 0 * (-inf - -inf): `weighted` has made it 0.
    return torch.stack([term.sum(dim=1), weighted(log_q.exp(), slope).sum(dim=1)], dim=1)


def mixture_gradient_(
    out_TV: Tensor,
    z_TV: Tensor,
    t_TV: Tensor,
    normalisers_T5: Tensor,
    mean_slope_T: Tensor,
    upstream_T: Tensor,
    mixture: Mixture,
    inverse_temperature: float,
) -> None:
    """Write ``upstream / temperature * q (d/dq - sum q d/dq)`` into ``out_TV``, which may be ``z_TV`` itself."""
    log_q, log_p = log_probs(z_TV, t_TV, normalisers_T5, inverse_temperature)
    _, slope = mixture_terms(log_q, log_p, mixture)
    grad = weighted(log_q.exp(), slope - mean_slope_T.unsqueeze(1))
    out_TV.copy_((upstream_T * inverse_temperature).unsqueeze(1) * grad)

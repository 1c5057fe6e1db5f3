"""The row and column scales that fit a weight matrix best."""

from __future__ import annotations

from torch import Tensor


def rank_one_svd(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """`sqrt(s1) u1 [out]`, `sqrt(s1) v1 [in]` of `|W| [out, in]`: the start of OneBit (SVID) and BinaryMoS.

    By power iteration: the matrix is non-negative, so its first singular vectors are and convergence is fast.
    """
    v = magnitude.mean(0)
    for _ in range(30):
        u = magnitude @ v
        u /= u.norm().clamp_min(1e-30)
        v = magnitude.T @ u
        sigma = v.norm().clamp_min(1e-30)
        v = v / sigma
    return u * sigma.sqrt(), v * sigma.sqrt()


def weighted_rank_one(magnitude: Tensor, column_weight: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Row scales `r [out]` and column scales `c [in]` that minimise `sum_ij h_j (|W_ij| - r_i c_j)^2`.

    With `h_j = E[x_j^2]` this is the output error of the binarized linear for inputs that are uncorrelated.
    Alternating least squares from the rank-1 SVD.

    Args:
        magnitude: `|W|`, float32 `[out, in]`.
        column_weight: `h`, float32 `[in]`, non-negative.
        iterations: alternations; each is two matrix-vector products.
    """
    r, c = rank_one_svd(magnitude)
    weight = (column_weight / column_weight.mean().clamp_min(1e-30)).clamp_min(1e-6)
    for _ in range(iterations):
        r = (magnitude @ (weight * c)) / (weight * c * c).sum().clamp_min(1e-30)
        c = (magnitude.T @ r) / (r * r).sum().clamp_min(1e-30)
    return r, c

"""Sums, norms and best approximations of delta W, worked out on the factors.

A layer's delta W is [out, in] with thousands of rows and columns, but a sum over clients has at most the sum
of their ranks. So nothing here ever forms a full matrix: with QR of both stacked factors, B = Q_b R_b and
A^T = Q_a R_a, everything that matters of B @ A sits in the small matrix R_b R_a^T. It costs
O((out + in) R^2) for a stack of rank R.
"""

from collections.abc import Sequence

import numpy as np

from tightbeam.federation.math.lora import LoraAdapter, LoraModule, Matrix

__all__ = ["best_rank", "difference_norm", "frobenius_norm", "stack", "weighted_mean"]


def stack(modules: Sequence[LoraModule], weights: Sequence[float]) -> LoraModule:
    """One module whose delta W is exactly the weighted sum of theirs; its rank is the sum of theirs.

    The weight goes into B only: in both factors it would count twice.
    """
    A_RI = np.concatenate([module.A_RI for module in modules], axis=0)
    weighted = [weight * module.B_OR for weight, module in zip(weights, modules, strict=True)]
    return modules[0].with_factors(A_RI, np.concatenate(weighted, axis=1))


def weighted_mean(tensors: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """Sum of weight times tensor, in float64 and in the order given."""
    total = np.zeros(tensors[0].shape, dtype=np.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor
    return total


def frobenius_norm(module: LoraModule) -> float:
    """Frobenius norm of delta W. Through QR: a Gram matrix would lose half of the digits."""
    _, R_b = np.linalg.qr(module.B_OR)
    _, R_a = np.linalg.qr(module.A_RI.T)
    return float(np.linalg.norm(R_b @ R_a.T))


def difference_norm(left: LoraAdapter, right: LoraAdapter) -> float:
    """Frobenius norm of the difference of two adapters' delta W, over all layers."""
    squares = 0.0
    for name, module in left.modules.items():
        squares += frobenius_norm(stack([module, right.modules[name]], [1.0, -1.0])) ** 2
    return float(np.sqrt(squares))


def best_rank(module: LoraModule, rank: int) -> LoraModule:
    """Return the closest delta W of at most `rank` (Eckart-Young), its spectrum split evenly over A and B.

    Directions come in order of their singular value, so that `truncated` of the result is the best
    approximation of each smaller rank too. Signs are fixed, since an SVD leaves them open: the entry of
    largest size in each row of A is positive. Directions without any weight are left out.
    """
    Q_b, R_b = np.linalg.qr(module.B_OR)
    Q_a, R_a = np.linalg.qr(module.A_RI.T)
    U, singular_values, V_t = np.linalg.svd(R_b @ R_a.T, full_matrices=False)
    noise = np.finfo(np.float64).eps * max(module.shape) * singular_values.max(initial=0.0)
    keep = min(rank, int(np.count_nonzero(singular_values > noise)))
    root = np.sqrt(singular_values[:keep])
    A_RI = root[:, None] * (V_t[:keep] @ Q_a.T)
    B_OR = (Q_b @ U[:, :keep]) * root
    peaks = A_RI[np.arange(keep), np.abs(A_RI).argmax(axis=1)]
    signs = np.where(peaks < 0, -1.0, 1.0)
    return module.with_factors(A_RI * signs[:, None], B_OR * signs)

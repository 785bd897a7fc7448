"""The QR factorisation of growing Lanczos matrices by rotations, a column at a time: MINRES' work on scalars."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotations(NamedTuple):
    """The scalars of MINRES for each row at work, float64 [k]; the letters are those of the papers.

    The Lanczos matrix T has a column (beta, alpha, beta of the next step). Two rotations turn it into a column
    (epsilon, above, gamma) of R, and leave entries of the next two.

    Attributes:
        active, tolerance, iterations: see ``RowScalars``.
        residual: |b - Ax| by the recurrence; NaN after something was not finite.
        largest: a lower bound of |A|.
        stationary: 1 where |Ar| has become small relative to |A||r|: then |r| gets no smaller.
        asks: 1 where "small" is half of the digits, 0 where it is all of them.
        misled: 1 where r'Mr was negative beyond rounding.
        size: |b - Ax| at the (re)start.
        alpha, beta: of the last step; beta is the one beside the next alpha.
        cosine, sine: of the last rotation.
        delta, epsilon: the entries left of the next column, and of the one after it.
        phi: the residual's norm; with M, its norm in M.
        gamma, gamma_before: the last two diagonal entries of R.
        norm: of the largest column of T, a lower bound of its norm.
    """

    active: Tensor
    tolerance: Tensor
    iterations: Tensor
    residual: Tensor
    largest: Tensor
    stationary: Tensor
    asks: Tensor
    misled: Tensor
    size: Tensor
    alpha: Tensor
    beta: Tensor
    cosine: Tensor
    sine: Tensor
    delta: Tensor
    epsilon: Tensor
    phi: Tensor
    gamma: Tensor
    gamma_before: Tensor
    norm: Tensor

    def begin(self, which: Tensor, size: Tensor, phi: Tensor) -> None:
        """(Re)starts these rows (a mask), in place."""
        for zero in (self.stationary, self.alpha, self.beta, self.sine, self.delta, self.epsilon):
            zero[which] = 0.0
        for one in (self.active, self.gamma, self.gamma_before):
            one[which] = 1.0
        self.cosine[which] = -1.0
        self.residual[which], self.size[which], self.phi[which] = size, size, phi


class Lengths(NamedTuple):
    """The coefficients of a step, [k] each; zero for rows that it does not change.

    Attributes:
        sound: whether the row is at work and all is finite.
        moved: whether x moves.
        w, w_before: the next w, times gamma, is z plus these multiples of the last w and the one before it.
        x: the multiple of the next w, times gamma, that is added to x.
        p: the divisor of the next Lanczos vector.
    """

    sound: Tensor
    moved: Tensor
    w: Tensor
    w_before: Tensor
    x: Tensor
    p: Tensor


def rotate(row: Rotations, alpha: Tensor, square: Tensor, eps: float, flat: float) -> tuple[Rotations, Lengths]:
    """Takes a new column of T into the factorisation.

    Before it is used for a step, |Ar| = phi |(gamma_bar, delta)| of the present x is known. Where that is small no step
    is taken: it would consist of rounding, or lead to steps that do.

    Args:
        row: of the step before.
        alpha: the diagonal entry of the new column.
        square: the square of the entry below it; negative where M is not positive definite.
        eps: the limit below which |Ar| / |A||r| is rounding.
        flat: the limit below which it is small, where ``row.asks``; elsewhere ``eps`` is.

    Returns:
        ``row`` after the step, without residual and active, valid where the step is sound; and the coefficients.

    Source:
        Paige and Saunders (1975); |Ar| as in Choi, Paige and Saunders (2011).
    """
    beta = square.clamp(min=0.0).sqrt()
    norm = torch.maximum(row.norm, (row.beta.square() + alpha.square() + beta.square()).sqrt())
    sound = (row.active != 0) & alpha.isfinite() & beta.isfinite()
    above = row.cosine * row.delta + row.sine * alpha
    gamma_bar, delta = row.sine * row.delta - row.cosine * alpha, -row.cosine * beta
    slope = torch.hypot(gamma_bar, delta) / norm  # NaN where A is zero
    moved = sound & (slope > torch.where(row.asks != 0, flat, eps))
    gamma = torch.hypot(gamma_bar, beta)
    cosine, sine = gamma_bar / gamma, beta / gamma
    lengths = Lengths(
        sound=sound,
        moved=moved,
        w=torch.where(moved, -above / row.gamma, 0.0),
        w_before=torch.where(moved, -row.epsilon / row.gamma_before, 0.0),
        x=torch.where(moved, cosine * row.phi / gamma, 0.0),
        p=torch.where(sound & (beta > 0), beta, 1.0),
    )
    after = row._replace(
        iterations=row.iterations + 1,  # a step that is not taken, too: its product was made
        stationary=(~moved).double(),
        misled=(square < -eps * norm.square()).double(),
        alpha=alpha,
        beta=beta,
        cosine=cosine,
        sine=sine,
        delta=delta,
        epsilon=row.sine * beta,
        phi=torch.where(moved, sine * row.phi, row.phi),
        gamma=gamma,
        gamma_before=row.gamma,
        norm=norm,
    )
    return after, lengths

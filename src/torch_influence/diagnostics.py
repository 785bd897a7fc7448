"""The ends of a curvature's spectrum: is it positive definite, how is it conditioned, what damping does it need?"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from torch_influence import memory
from torch_influence.linop import LinearOperator
from torch_influence.problem import Problem
from torch_influence.solvers import Progress, lanczos, norms, rounding

__all__ = ["Damping", "Spectrum", "spectrum", "suggest_damping"]

_STEPS = 300  # of the Lanczos process; with d up to this number, the dense matrix is made instead, for all eigenvalues


@dataclasses.dataclass(frozen=True, repr=False)
class Spectrum:
    """The ends of the spectrum of an undamped curvature H; ``print`` it.

    Tensors are float64, on the CPU, and have k entries, or as many as there are.

    Attributes:
        smallest, largest: eigenvalues of H at either end, ascending.
        smallest_errors, largest_errors: how far from each an eigenvalue of H is at most: |Hy - θy| of the unit Ritz
            vectors, from its definition, and 32 roundings of the largest eigenvalue for the products.
        size: d.
        dtype: of the products.
        damp: λ of A = H + λI.
        products: rows that were multiplied by H.
        complete: whether all of H's eigenvalues were computed, and these are truly the outermost, each as often as it
            occurs. Where not, they are Ritz values: H goes at least as far as they do, up to their errors.
        converged: whether the errors are as small as was asked for.
    """

    smallest: Tensor
    largest: Tensor
    smallest_errors: Tensor
    largest_errors: Tensor
    size: int
    dtype: torch.dtype
    damp: float
    products: int
    complete: bool
    converged: bool

    @property
    def definite(self) -> bool | None:
        """Whether A = H + damp·I is positive definite, beyond the errors; None where they leave it open."""
        value, error = float(self.smallest[0]) + self.damp, float(self.smallest_errors[0])
        return None if abs(value) <= error else value > 0

    @property
    def condition(self) -> float:
        """(λ_max + damp) / (λ_min + damp), where A is positive definite; infinite where it is not, or may not be."""
        if not self.definite:
            return math.inf
        return (float(self.largest[-1]) + self.damp) / (float(self.smallest[0]) + self.damp)

    def __str__(self) -> str:
        how = "all eigenvalues" if self.complete else "Lanczos, multiple eigenvalues show once"
        made = f"{self.products} products in {_name(self.dtype)}"
        lines = [f"Spectrum of the curvature, d = {self.size:,}: {how}; {made}"]
        for what, values, errors in (
            ("smallest", self.smallest, self.smallest_errors),
            ("largest", self.largest, self.largest_errors),
        ):
            pairs = zip(values.tolist(), errors.tolist(), strict=True)
            lines.append(f"{what + ':':<10}" + ", ".join(f"{value:.4g} ± {error:.1g}" for value, error in pairs))
        lines.append(f"{'damped:':<10}by damp = {self.damp:g}, " + self._verdict())
        if not self.converged:
            lines.append(f"{'':<10}the errors are larger than was asked for: maxiter ended the process")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Spectrum: {float(self.smallest[0]):.4g} to {float(self.largest[-1]):.4g}, damp = {self.damp:g}>"

    def plot(self, ax: Any = None) -> Any:
        """Draws the eigenvalues of H with their errors, and where -damp is: what lies left of it makes A indefinite.

        Args:
            ax: matplotlib axes to draw into; new ones by default.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed: ``pip install 'torch-influence[plot]'``.
        """
        from torch_influence import plot  # when asked to draw

        return plot.spectrum(self, ax=ax)

    def _verdict(self) -> str:
        least, error = float(self.smallest[0]) + self.damp, float(self.smallest_errors[0])
        if self.definite is False:
            return (
                f"not positive definite: smallest eigenvalue {least:.3g}. Scores are those of a saddle point; damping "
                f"larger by at least {-1.1 * (least - error):.3g} makes it definite, gnh=True does for convex losses"
            )
        if self.definite is None:
            return (
                f"singular as far as can be told: smallest eigenvalue {least:.2g} ± {error:.2g}. Raise damp, by "
                f"{error - least:.2g} or more; suggest_damping() says by how much"
            )
        digits = -math.log10(torch.finfo(self.dtype).eps)
        return (
            f"positive definite: smallest eigenvalue {least:.3g}, condition {self.condition:.3g}. Of the {digits:.0f} "
            f"digits of {_name(self.dtype)} a solve may lose {max(0.0, math.log10(self.condition)):.0f}; conjugate "
            f"gradients need {min(_iterations(self.condition), self.size)} iterations at most, about, for rtol=1e-5"
        )


def spectrum(
    operator: LinearOperator,
    k: int = 3,
    *,
    damp: float = 0.0,
    rtol: float = 0.01,
    maxiter: int = _STEPS,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Spectrum:
    """Finds the k smallest and k largest eigenvalues of H, each with a bound of its error.

    With d <= ``maxiter`` they are those of the dense matrix, so that multiple ones show as such. Beyond, they are Ritz
    values of the Lanczos process with full reorthogonalisation, for which another product shows the residuals |Hy - θy|
    from their definition: there is an eigenvalue within that distance, whatever the process went through.

    Args:
        operator: H, symmetric, undamped.
        k: at either end.
        damp: λ >= 0 of A = H + λI.
        rtol: ends when each eigenvalue of A at the ends is known to within rtol times itself, or to rounding.
        maxiter: products at the most.
        dtype: in which products are computed, if that is less precise than H's.
        progress: wraps the steps in a progress bar.

    Returns:
        The ``Spectrum``.

    Raises:
        ValueError: k, maxiter less than 1; rtol negative; a product that is not finite.

    Cost:
        d rows in one product and d³ where d <= maxiter; else up to ``maxiter`` products, about as many as conjugate
        gradients make, and one of 2 k rows. Memory: d², or products x d.

    Source:
        Lanczos (1950); the bound: Parlett, The Symmetric Eigenvalue Problem (1998), theorem 4.5.1.
    """
    if not rtol >= 0:
        raise ValueError(f"rtol: expected a number >= 0, got {rtol}")
    if k < 1 or maxiter < 1:
        raise ValueError(f"k, maxiter: expected at least 1, got {k} and {maxiter}")
    d = operator.size
    dtype = operator.dtype if dtype is None else dtype
    noise = rounding(dtype)
    if d <= maxiter:
        matrix = operator.dense().double()
        if not matrix.isfinite().all():
            raise ValueError("a product with the curvature is not finite: its eigenvalues are not defined")
        values = torch.linalg.eigvalsh(matrix).cpu()
        errors = torch.full_like(values, noise * float(values.abs().max()))
        products, complete, converged = d, True, True
    else:
        ritz = lanczos(
            operator.damped(damp), k, rtol=rtol, relative_to="each", maxiter=maxiter, vectors=True, progress=progress
        )
        assert ritz.vectors is not None  # they were asked for
        values, errors = _judged(operator, ritz.vectors)
        errors += noise * float((ritz.values - damp).abs().max())
        products, complete, converged = ritz.products + len(values), False, ritz.converged
    return Spectrum(
        smallest=values[:k],
        largest=values[-k:],
        smallest_errors=errors[:k],
        largest_errors=errors[-k:],
        size=d,
        dtype=dtype,
        damp=float(damp),
        products=products,
        complete=complete,
        converged=converged,
    )


def ends_of(problem: Problem, operator: LinearOperator, k: int, rtol: float, maxiter: int | None = None) -> Spectrum:
    """The ends of the spectrum of a problem's curvature, by as many steps as memory allows. Inside a session."""
    if maxiter is None:
        maxiter = max(2 * k, min(_STEPS, memory.free_memory(problem.device) // 4 // problem.row_bytes))
    dtype = problem.space.pass_dtype
    return spectrum(operator, k, damp=problem.damp, rtol=rtol, maxiter=maxiter, dtype=dtype, progress=problem.bar)


def _judged(operator: LinearOperator, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Computes Rayleigh quotients θ of rows y, ascending, and |Hy - θy|, in float64 whatever the rows' dtype."""
    products, rows = operator.product(rows).detach().double(), rows.double()
    squares = rows.square().sum(dim=1)
    values = (rows * products).sum(dim=1) / squares
    residuals = norms(products - values[:, None] * rows) / squares.sqrt()
    order = values.argsort()
    return values[order].cpu(), residuals[order].cpu()


def _iterations(condition: float, rtol: float = 1e-5) -> int:
    """Bounds the steps of conjugate gradients, by |r_i| <= 2 √κ ((√κ - 1)/(√κ + 1))^i |r_0| in exact arithmetic."""
    return max(1, math.ceil(0.5 * condition**0.5 * math.log(2 * condition**0.5 / rtol)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- damping --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Damping:
    """A damping, and why; ``print`` it, or ``float()`` it.

    Attributes:
        damp: to be used: the present one where it is enough, else ``least``.
        least: the least that is enough, 0 where none is needed.
        present: the damping that the module has.
        condition: of the curvature with ``damp``, about.
        reasons: in words, with the numbers.
        spectrum: what it was made of.
    """

    damp: float
    least: float
    present: float
    condition: float
    reasons: tuple[str, ...]
    spectrum: Spectrum

    def __float__(self) -> float:
        return self.damp

    def __str__(self) -> str:
        return "\n".join([f"damp = {self.damp:.3g}", *(f"  {reason}" for reason in self.reasons)])


def suggest_damping(found: Spectrum) -> Damping:
    """Finds the least damping that makes A = H + damp·I safely positive definite, and solves keep half their digits.

        damp >= -1.1 (λ_min - error)                       where that is positive
        (λ_max + error + damp) / (λ_min - error + damp) <= κ = 1 / √ε,   ε of the dtype

    The first is what the warnings of the solvers say: a tenth more than the most negative eigenvalue, as far as it may
    lie given its error. The second: a backward stable solve has a relative error of about κ(A) ε (Higham, Accuracy and
    Stability of Numerical Algorithms, sections 7.1 and 10.1), so that with κ(A) <= 1/√ε half of the digits are right,
    which is where the solvers of this package begin to warn. Such a κ(A) bounds the iterations of conjugate gradients
    as well, to some 500 in float32.

    Damping is a bias, and this the least of it that the arithmetic asks for; it is not the best for the scores. The
    part of A⁻¹b along an eigenvector of H with eigenvalue λ is λ/(λ + damp) of what it would be, so that directions
    flatter than damp count for less than half of what a refit would show. In exchange the scores are those of a model
    that is kept near the present one: a proximal term of weight damp in the refit's objective (Bae, Ng, Lo,
    Ghassemi and Grosse 2022; Koh and Liang 2017, section 4.2, for the damping of indefinite Hessians).

    Args:
        found: the ends of the spectrum; its ``damp`` is the present one.

    Returns:
        A ``Damping``, with its reasons.

    Examples:
        >>> from torch_influence.linop import Dense
        >>> found = spectrum(Dense(torch.diag(torch.tensor([-0.5, 1.0, 2.0], dtype=torch.float64))))
        >>> suggest_damping(found).damp
        0.56
    """
    smallest, error = float(found.smallest[0]), float(found.smallest_errors[0])
    low, high = smallest - error, float(found.largest[-1]) + float(found.largest_errors[-1])
    kappa = torch.finfo(found.dtype).eps ** -0.5
    definite = max(0.0, -1.1 * low)
    conditioned = max(0.0, (high - kappa * low) / (kappa - 1)) if high > low else 0.0
    least = _rounded_up(max(definite, conditioned))
    zero = least == 0.0 and high <= 0.0  # so is H, and A is as good as its damping
    damp = max(found.damp, least)
    damp = 1.0 if zero and not damp else damp
    condition = (high + damp) / (low + damp)

    seen = f"smallest eigenvalue {smallest:.3g} ± {error:.1g}, largest {float(found.largest[-1]):.3g}"
    reasons = [f"undamped curvature: {seen}"]
    if definite > 0:
        reasons.append(f"positive definite from {definite:.2g} on, with a margin of a tenth")
    if conditioned > 0:
        reasons.append(
            f"condition below {kappa:.2g} = 1/√ε of {_name(found.dtype)}, for half of its digits, from "
            f"{conditioned:.2g} on"
        )
    if zero:
        reasons.append("the curvature is zero: any damping will do")
    elif least == 0.0:
        reasons.append(f"positive definite and well-conditioned for {_name(found.dtype)} as it is: none is needed")
    if error > 0.1 * abs(smallest) and not found.converged:
        reasons.append("the smallest eigenvalue is not known well; with a larger maxiter less might be enough")
    if found.damp >= least and found.damp > 0:
        reasons.append(f"the present damp = {found.damp:g} is enough")
    reasons.append(
        f"with damp = {damp:.3g}: eigenvalues {low + damp:.3g} to {high + damp:.3g}, condition {condition:.3g}"
    )
    if damp > 0:
        reasons.append(f"its price: directions of curvature below {damp:.2g} count for less than half in the scores")
    return Damping(damp, least, found.damp, condition, tuple(reasons), found)


def _rounded_up(x: float) -> float:
    """Rounds up to two digits."""
    if x <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(x)) - 1)
    return float(f"{math.ceil(x / unit) * unit:.2g}")

"""The named pairings of a curvature with a solver."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import data

from torch_influence.caller import level_of_the_user
from torch_influence.curvature import Kind
from torch_influence.estimates import EstimatingModule
from torch_influence.failures import OnFailure
from torch_influence.linop import Dense
from torch_influence.memory import Cache
from torch_influence.objective import BaseObjective
from torch_influence.parameters import Selection
from torch_influence.plan import Step
from torch_influence.solvers import CG, Direct, LiSSA, Solver, cg, refuse_if_too_large, rounding
from torch_influence.solving import SolvingModule, check_product_dtype, chosen_curvature

__all__ = ["AutogradInfluenceModule", "CGInfluenceModule", "LiSSAInfluenceModule"]


class AutogradInfluenceModule(SolvingModule):
    """Solves with the exact Hessian as a dense matrix: A = ∇²L(θ) + damp·I, formed and factored in the constructor.

    The matrix stays that of the construction: a warning says so if the parameters have changed since.

    Args:
        model, objective, train_loader, test_loader, device: see BaseInfluenceModule.
        params, progress, cache, on_failure: see BaseInfluenceModule.
        damp: λ >= 0, added once to the Hessian's diagonal.
        check_eigvals: raise if A has a negative eigenvalue. Without it an indefinite A is solved by LU, with a warning.

    Attributes:
        hess: the undamped Hessian, [d, d].
        inverse_hess: A⁻¹, [d, d], computed when first read.

    Raises:
        MemoryError: the matrices don't fit; nothing has been computed yet.
        ValueError: A has a negative eigenvalue and ``check_eigvals`` is set; the message has the eigenvalue.
        torch.linalg.LinAlgError: A is singular.

    Cost:
        one pass over the data with d rows, d³/3; memory 3 d² (d = 10,000 in float32: 1.2 GB).

    Examples:
        >>> module = AutogradInfluenceModule(model, objective, train_loader, test_loader, "cpu", damp=1e-3)
        >>> scores = module.influences(train_idxs=range(5), test_idxs=[0])
    """

    def __init__(
        self,
        model: nn.Module,
        objective: BaseObjective,
        train_loader: data.DataLoader[Any],
        test_loader: data.DataLoader[Any] | None,
        device: torch.device | str,
        damp: float,
        check_eigvals: bool = False,
        *,
        params: Selection = None,
        progress: bool = False,
        cache: Cache = "auto",
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__(
            model,
            objective,
            train_loader,
            test_loader,
            device,
            params=params,
            progress=progress,
            cache=cache,
            on_failure=on_failure,
        )
        self.damp = damp
        problem = self._problem
        refuse_if_too_large(problem.space.size, problem.space.dtype, self.device, type(self).__name__)
        with self._session():
            self.hess = problem.curvature().dense()
            self._built_at = problem.seen
        self._hessian = Dense(self.hess)
        self._direct = Direct()
        self._inverse: tuple[float, Tensor] | None = None
        if check_eigvals:
            damped = self._hessian.damped(damp).dense()
            eigenvalues = torch.linalg.eigvalsh(damped)
            smallest = float(eigenvalues[0])
            if smallest < 0:
                if smallest >= -rounding(damped.dtype) * float(eigenvalues.abs().max()):
                    raise ValueError(
                        f"the damped Hessian is singular, to the rounding of {damped.dtype}: its smallest eigenvalue "
                        f"is {smallest:.3g}; damp={damp:g} is too small"
                    )
                raise ValueError(
                    f"the damped Hessian has a negative eigenvalue, {smallest:.6g}: damp={damp:g} is too small by at "
                    "least that much, or the model is not at a minimum of its training objective"
                )
        self._direct.factor(self._hessian.damped(damp), on_failure)

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        """A⁻¹ v for [d] or rows [k, d]."""
        problem = self._problem
        rows = problem.as_rows(vec, "vec")
        with self._session():
            if problem.seen != self._built_at:
                warnings.warn(
                    "parameters or buffers of the model, or what this module is made of, have changed since it was "
                    "built: its Hessian is that of the construction; build a new module for what is new",
                    UserWarning,
                    stacklevel=level_of_the_user(),
                )
            operator = self._hessian.damped(problem.damp)
            return self._solved(self._direct.solve, operator, rows, on_failure=problem.on_failure).reshape(vec.shape)

    def __getstate__(self) -> dict[str, Any]:
        """As for other modules; whether the Hessian was up to date, in place of when it was built."""
        with self._session():
            up_to_date = self._problem.seen == self._built_at
        return {**super().__getstate__(), "_built_at": up_to_date}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        with self._session():
            self._built_at = self._problem.seen if state["_built_at"] else ()

    @property
    def inverse_hess(self) -> Tensor:
        """A⁻¹, [d, d]."""
        with self._problem.evaluation.alone():
            damp = self.damp
            if self._inverse is None or self._inverse[0] != damp:
                operator = self._hessian.damped(damp)
                self._inverse = damp, self._direct.factor(operator, self.on_failure).inverse()
            return self._inverse[1]

    @property
    def _solver(self) -> Solver:
        return self._direct

    def _solve_step(self, queries: int) -> Step:
        return self._direct.describe(self._hessian.damped(self.damp), queries)

    def _forget(self) -> None:
        """Keeps the factor: it is of the Hessian of the construction."""


def _option_of_cg(name: str) -> property:
    """An entry of ``cg_kwargs`` as an attribute, for those who set it as they set InfluenceModule's."""
    default = inspect.signature(cg).parameters[name].default

    def read(self: CGInfluenceModule) -> Any:
        return self._options().get(name, default)

    def write(self: CGInfluenceModule, value: Any) -> None:
        self.cg_kwargs = {**self._options(), name: value}

    return property(read, write, doc=f"``cg_kwargs[{name!r}]``.")


class CGInfluenceModule(SolvingModule):
    """Solves by conjugate gradients, all right-hand sides at once, on the device.

    Args:
        model, objective, train_loader, test_loader, device: see BaseInfluenceModule.
        params, progress, cache, on_failure: see BaseInfluenceModule.
        damp: λ >= 0, added once to the curvature: A = ∇²L(θ) + λI.
        curvature: "hessian", or "gauss-newton", which is positive semi-definite for convex losses; or a subclass of
            ``torch_influence.curvature.Curvature``.
        gnh: an older spelling of ``curvature="gauss-newton"``.
        product_dtype: ``torch.bfloat16`` rounds the operands of the curvature's matrix products to it, inside of the
            iterations; vectors, recurrences and the residuals that solutions are judged by stay in float32. For rtol of
            1e-2 and more, and for machines that multiply bfloat16 faster. It is never chosen by itself.
        **kwargs: those of ``scipy.sparse.linalg.cg``: rtol (or its older name tol), atol, maxiter, x0, M, callback,
            with its meanings and defaults. See ``torch_influence.solvers.cg``. What M=Nystrom(rank) or M=Jacobi()
            makes is kept for later solves, until the curvature or damp changes.

    Attributes:
        cg_kwargs: the keywords. ``module.rtol = 1e-8`` and likewise atol, maxiter and M change them for later solves.

    Raises:
        TypeError: an unknown keyword.
        ValueError: product_dtype, and rtol below 1e-2 or parameters that are not float32.

    Warns:
        ConvergenceWarning: a right-hand side did not converge.

    Cost:
        one pass over the training data per iteration, however many right-hand sides; memory 4 k d, and that of M.

    Examples:
        >>> module = CGInfluenceModule(model, objective, train_loader, test_loader, "cpu", damp=1e-3, rtol=1e-6)
        >>> matrix = module.influence_matrix(test_idxs=[0, 1, 2])
    """

    rtol = _option_of_cg("rtol")
    atol = _option_of_cg("atol")
    maxiter = _option_of_cg("maxiter")
    M = _option_of_cg("M")

    def __init__(
        self,
        model: nn.Module,
        objective: BaseObjective,
        train_loader: data.DataLoader[Any],
        test_loader: data.DataLoader[Any] | None,
        device: torch.device | str,
        damp: float,
        gnh: bool = False,
        *,
        curvature: Kind | None = None,
        product_dtype: torch.dtype | None = None,
        params: Selection = None,
        progress: bool = False,
        cache: Cache = "auto",
        on_failure: OnFailure = "warn",
        **kwargs: Any,
    ) -> None:
        known = inspect.signature(cg).parameters.keys() - {"A", "B", "progress", "on_failure"} | {"tol"}
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"CGInfluenceModule got an unexpected keyword {name!r}; CG takes {', '.join(sorted(known))}"
                )
        if {"tol", "rtol"} <= kwargs.keys():
            raise TypeError("CGInfluenceModule got both rtol and tol, which is its older name; give one")
        super().__init__(
            model,
            objective,
            train_loader,
            test_loader,
            device,
            params=params,
            progress=progress,
            cache=cache,
            on_failure=on_failure,
        )
        self.damp = damp
        self.curvature = chosen_curvature(curvature, gnh)
        self.cg_kwargs = kwargs
        self.product_dtype = product_dtype
        self._rounded_to()
        self._cg = CG()
        self._problem.warn_if_train_loss_is_overridden()

    @property
    def _solver(self) -> Solver:
        return self._cg.with_options(**{**_CG_DEFAULTS, **self._options()})

    def _rounded_to(self) -> torch.dtype | None:
        return check_product_dtype(self.product_dtype, self._problem.space.dtype, self.rtol)

    def _options(self) -> dict[str, Any]:
        return {"rtol" if name == "tol" else name: value for name, value in self.cg_kwargs.items()}


_CG_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(CG).parameters.items()}


class LiSSAInfluenceModule(EstimatingModule):
    """Estimates by LiSSA: a Neumann series with one minibatch, of the train loader's batch size, per term.

        h₀ = v,   h_t = v + h_{t-1} - (H_t + damp·I) h_{t-1} / scale,   A⁻¹v ≈ mean over repeats of h_depth / scale

    Args:
        model, objective, train_loader, test_loader, device: see BaseInfluenceModule.
        params, progress, cache, on_failure: see BaseInfluenceModule.
        damp: λ >= 0, added once to the curvature; it is not multiplied by ``scale``.
        repeat: independent runs that are averaged. Two or more tell how far they are from one another:
            ``last_report.standard_error``, and ``influences(..., standard_error=True)`` for that of each score.
        depth: steps of each. In the eigenvectors of least curvature it takes scale/damp of them to get within a third.
        scale: larger than half the largest eigenvalue of any minibatch's curvature, or it diverges. "auto" takes that
            of sampled minibatches, and more where that turns out to be too little; ``torch_influence.solvers.lissa``
            says what this guarantees. It is kept until the curvature changes; ``last_report.method`` tells it.
        curvature: "hessian" or "gauss-newton", or a subclass of ``torch_influence.curvature.Curvature``.
        gnh: an older spelling of ``curvature="gauss-newton"``.
        debug_callback: called as debug_callback(run, step, h), h of shape [d] ([k, d] when k rows are solved at once).
        generator: where minibatches are drawn from. By default torch's default generator, in the way DataLoader draws.
        rtol: stop after the repeat, the second or a later one, when all stests' standard errors, relative to their
            size, are within it.

    Warns:
        DivergenceWarning: the steps expand: what is lost is NaN. The scale or the damping that cures it is named.
        ConvergenceWarning: NaN in data or parameters, an overflow; a depth that is far too small; a standard error
            beyond ``rtol``, or beyond half the estimate.
        NegativeCurvatureWarning: the estimate grows as it only does where the curvature is indefinite.

    Cost:
        repeat x depth minibatch products, however many right-hand sides, and up to 160 once for the scale; memory
        6 k d, whatever the depth, about 40 d for the scale.

    Examples:
        >>> module = LiSSAInfluenceModule(
        ...     model, objective, train_loader, test_loader, "cpu", damp=0.1, repeat=4, depth=100
        ... )
        >>> scores, error = module.influences([0, 1, 2], [0], standard_error=True)
        >>> print(module.last_report)
    """

    def __init__(
        self,
        model: nn.Module,
        objective: BaseObjective,
        train_loader: data.DataLoader[Any],
        test_loader: data.DataLoader[Any] | None,
        device: torch.device | str,
        damp: float,
        repeat: int,
        depth: int,
        scale: float | Literal["auto"] = "auto",
        gnh: bool = False,
        debug_callback: Callable[[int, int, Tensor], None] | None = None,
        *,
        curvature: Kind | None = None,
        params: Selection = None,
        progress: bool = False,
        cache: Cache = "auto",
        on_failure: OnFailure = "warn",
        generator: torch.Generator | None = None,
        rtol: float | None = None,
    ) -> None:
        super().__init__(
            model,
            objective,
            train_loader,
            test_loader,
            device,
            params=params,
            progress=progress,
            cache=cache,
            on_failure=on_failure,
        )
        self.damp = damp
        self.curvature = chosen_curvature(curvature, gnh)
        self.repeat = repeat
        self.depth = depth
        self.scale = scale
        self.debug_callback = debug_callback
        self.generator = generator
        self.rtol = rtol
        self._lissa = LiSSA(depth=depth)
        self._problem.warn_if_train_loss_is_overridden()

    @property
    def _solver(self) -> Solver:
        return self._lissa.with_options(
            repeat=self.repeat,
            depth=self.depth,
            scale=self.scale,
            rtol=self.rtol,
            generator=self.generator,
            callback=self.debug_callback,
            after_repeat=self._after_repeat(),
        )

"""A curvature with products in a narrower dtype than its own, beside the one that solutions are judged by."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_influence.agreement import agree
from torch_influence.curvature._curvature import Curvature
from torch_influence.linop import Dual, DualCost, LinearOperator, probe_rows
from torch_influence.plan import NotPossible


class Rounded(LinearOperator):
    """A curvature whose products are rounded to ``product_dtype`` on the way, if these are near enough to its own.

    A product with a random row is compared with the curvature's own. Where it is another, or can't be had, products
    are the curvature's, and ``why_not`` says why. Whatever is no product (``dense``, ``dual``) is the curvature's.

    Args:
        curvature: with its own products; inside of a session.
        dtype: of products.
    """

    def __init__(self, curvature: Curvature, dtype: torch.dtype) -> None:
        self._curvature, self._dtype = curvature, dtype
        self.size, self.dtype, self.device = curvature.size, curvature.dtype, curvature.device
        self._narrow: LinearOperator = curvature
        self.why_not = ""
        try:
            narrow = curvature.narrowed(dtype)
            row = probe_rows(1, self.size, dtype=self.dtype, device=self.device)
            if not agree(narrow.product(row), curvature.product(row), dtype):
                raise NotPossible("a product differs from the curvature's own by more than rounding")
            self._narrow = narrow
        except NotPossible as why:
            self.why_not = str(why)
        except Exception as error:  # such as an operator that knows no bfloat16
            self.why_not = f"a product failed: {error}"

    @property
    def exact(self) -> LinearOperator:
        return self._curvature

    @property
    def product_dtype(self) -> torch.dtype:
        return self.dtype if self.why_not else self._dtype

    def product(self, rows: Tensor) -> Tensor:
        return self._narrow.product(rows)

    def diagonal(self) -> Tensor | None:
        return self._curvature.diagonal()

    def dense(self) -> Tensor:
        return self._curvature.dense()

    @property
    def least(self) -> float | None:
        return self._curvature.least

    @property
    def operations(self) -> float:
        """Counts those of the curvature: how much faster its products will be is not known."""
        return self._curvature.operations

    @property
    def operations_of_dense(self) -> float:
        return self._curvature.operations_of_dense

    def inverse(self, shift: float) -> LinearOperator:
        return self._curvature.inverse(shift)

    def dual(self, shift: float, room: float) -> Dual:
        return self._curvature.dual(shift, room)

    def dual_cost(self, shift: float) -> DualCost:
        return self._curvature.dual_cost(shift)

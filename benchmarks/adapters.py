"""What peers.py measures: the scores of a workload by this package, by the old algorithm, and by other packages.

Every adapter is a function (workload, queries) -> scores [n, queries] by our definition: theirs are converted with the
factor, the damping and, where the regulariser is left out of their gradients, the centring of docs/meaning.md. Theirs
are called as their own documentation does, and imported where they are used, so that none of them has to be installed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import scipy.sparse.linalg
import torch
from baseline import Baseline
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from workloads import Workload

from torch_influence import BaseInfluenceModule, CGInfluenceModule, InfluenceModule
from torch_influence.linop import aslinearoperator
from torch_influence.solvers import block_cg

Scores = Callable[[Workload, int], Tensor]
HESSIAN, GAUSS_NEWTON = "Hessian", "Gauss-Newton"
DEFAULT, SAME = "defaults", "same damping"


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
        peer: The name by which pip knows the package.
        module: What is imported before the clock runs.
        method: The class, and the settings that matter.
        setting: DEFAULT: all that the package lets one leave out is left out; SAME: our damping, and our tolerance
            where there is one; for our own: what was asked for.
        computes: Curvature, sum or mean, damping, solver; in a few words.
        curvature: Which exact scores these are compared with.
        exact: Whether it converges to them.
        queries: At most so many.
    """

    peer: str
    module: str
    method: str
    setting: str
    computes: str
    scores: Scores
    curvature: str = HESSIAN
    exact: bool = True
    queries: int | None = None


def convert(theirs: Tensor, factor: float) -> Tensor:
    """Ours from theirs [n, q] where the regulariser is left out of the gradients: scaled, then centred."""
    scores = theirs.detach() * factor
    return scores - scores.mean(dim=0)


def ridge(work: Workload) -> float:
    """What stands on the diagonal beside the curvature of the losses."""
    return work.objective.l2 + work.damp


def query_data(work: Workload, queries: int) -> TensorDataset:
    return TensorDataset(*(tensor[:queries] for tensor in work.test.tensors))


def in_a_container(model: nn.Module) -> nn.Module:
    """A copy in which the layers are submodules: some packages don't look at the model itself."""
    return nn.Sequential(copy.deepcopy(model)) if isinstance(model, nn.Linear) else copy.deepcopy(model)


# -- ours ------------------------------------------------------------------------------------------------------------


def module(work: Workload, queries: int, solver: str, curvature: str) -> Tensor:
    loaders = work.train_loader(), work.test_loader()
    gnh = curvature == GAUSS_NEWTON
    found = InfluenceModule(work.model, work.objective, *loaders, "cpu", work.damp, gnh, solver, rtol=work.rtol)
    return found.influence_matrix(None, range(queries))


def cg_module(work: Workload, queries: int, curvature: str) -> Tensor:
    loaders, gnh = (work.train_loader(), work.test_loader()), curvature == GAUSS_NEWTON
    found = CGInfluenceModule(work.model, work.objective, *loaders, "cpu", work.damp, gnh=gnh, rtol=work.rtol)
    return found.influence_matrix(None, range(queries))


def old_algorithm(work: Workload, queries: int) -> Tensor:
    loaders = work.train_loader(), work.test_loader()
    found = Baseline(work.model, work.objective, *loaders, work.damp, gnh=True)
    columns = [found.scores(found.solve_cg(found.test_gradient([q]), work.rtol)) for q in range(queries)]
    return torch.stack(columns, dim=1)


# -- pyDVL -----------------------------------------------------------------------------------------------------------


def pydvl(work: Workload, queries: int, kind: str, same: bool, **options: Any) -> Tensor:
    """Averages batches without regard to their sizes, so that all the data are one batch where it is to be exact.

    Its conjugate gradients compare |r| with rtol² |b|, so that the root of ours asks for the same.
    """
    import pydvl.influence.torch as pd

    if same:
        options = options | {"regularization": ridge(work)}
    if kind == "CgInfluence" and same:
        options = options | {"rtol": work.rtol**0.5, "atol": 0.0}
    loader = DataLoader(work.train, len(work.train)) if same else work.train_loader()
    model = getattr(pd, kind)(work.model, work.objective.loss, **options).fit(loader)
    return convert(model.influences(*query_data(work, queries).tensors, *work.train.tensors).mT, 1 / len(work.train))


# -- captum ----------------------------------------------------------------------------------------------------------


def captum(work: Workload, queries: int, kind: str, same: bool, **options: Any) -> Tensor:
    """Its Hessian is a sum. Gradients of examples by its hooks where its own documentation allows that."""
    import captum.influence._core.arnoldi_influence_function as arnoldi  # not exported, though documented
    import captum.influence._core.influence_function as naive

    n = len(work.train)
    model = in_a_container(work.model)
    loss = nn.CrossEntropyLoss(reduction="none")
    if same and kind == "ArnoldiInfluenceFunction":
        loss = nn.CrossEntropyLoss(reduction="sum")
        options = options | {"sample_wise_grads_per_batch": True}
    if same:
        options = options | {"hessian_reg": n * ridge(work)}
    loader = DataLoader(work.train, n) if same else work.train_loader()
    given = {"checkpoint": "", "checkpoints_load_func": lambda *_: 1.0, "loss_fn": loss}
    where = arnoldi if kind == "ArnoldiInfluenceFunction" else naive
    found = getattr(where, kind)(model, loader, **given, **options)
    return convert(found.influence(query_data(work, queries).tensors).mT, 1.0)


def tracin(work: Workload, queries: int) -> Tensor:
    import captum.influence as ca

    loss = nn.CrossEntropyLoss(reduction="sum")
    given = {"checkpoints_load_func": lambda *_: 1.0, "loss_fn": loss, "batch_size": len(work.train)}
    found = ca.TracInCP(in_a_container(work.model), work.train, [""], **given, sample_wise_grads_per_batch=True)
    return convert(found.influence(query_data(work, queries).tensors).mT, 1 / len(work.train))


# -- kronfluence -----------------------------------------------------------------------------------------------------


def kronfluence(work: Workload, queries: int, same: bool) -> Tensor:
    from kronfluence import Analyzer, Task, prepare_model
    from kronfluence.arguments import ScoreArguments

    class Classify(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            outputs = model(batch[0])
            labels = batch[1]
            if sample:
                labels = torch.multinomial(outputs.detach().softmax(dim=-1), 1).squeeze(-1)
            return F.cross_entropy(outputs, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    torch.manual_seed(0)  # the sampled labels
    task = Classify()
    with tempfile.TemporaryDirectory() as folder:
        model = prepare_model(in_a_container(work.model), task)
        analyzer = Analyzer("peers", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.fit_all_factors("factors", work.train)
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query_data(work, queries),
            work.train,
            per_device_query_batch_size=queries,
            score_args=ScoreArguments(damping_factor=ridge(work)) if same else None,
        )
        theirs = analyzer.load_pairwise_scores("scores")["all_modules"]
    return convert(theirs.mT, 1 / len(work.train))


# -- dattri ----------------------------------------------------------------------------------------------------------


def dattri(work: Workload, queries: int, kind: str, same: bool, **options: Any) -> Tensor:
    """Its loss sees the parameters, so the regulariser is in; mean loss, and one batch where it is to be exact."""
    import dattri.algorithm.influence_function as da
    from dattri.task import AttributionTask

    model = in_a_container(work.model)

    def loss(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, data[0]), data[1])

    def objective(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        return loss(params, data) + 0.5 * work.objective.l2 * sum(p.square().sum() for p in params.values())

    task = AttributionTask(objective, model, model.state_dict(), target_func=loss)
    size = len(work.train) if same else work.train_loader().batch_size
    if same and kind == "IFAttributorEKFAC":
        options = options | {"damping": ridge(work)}  # the Fisher information of hooks lacks the regulariser
    elif same:
        options = options | {"regularization": work.damp}
    found = getattr(da, kind)(task, device="cpu", **options)
    found.cache(DataLoader(work.train, size))
    return found.attribute(DataLoader(work.train, size), DataLoader(query_data(work, queries), queries)).detach() / len(
        work.train
    )


# -- curvlinops ------------------------------------------------------------------------------------------------------


class ByCurvlinops(BaseInfluenceModule):
    """Gradients and scores by this package; stests by ``solve``, a function of curvlinops' operator and rows [k, d]."""

    batched = True

    def __init__(
        self, work: Workload, solve: Callable[[Any, Workload, Tensor], Tensor], kind: str, same: bool, **options: Any
    ) -> None:
        import curvlinops

        loader = work.train_loader()
        super().__init__(work.model, work.objective, loader, work.test_loader(), "cpu")
        self.work, self.solve = work, solve
        data, parameters = [work.train.tensors] if same else loader, list(work.model.parameters())
        self.operator = getattr(curvlinops, kind)(work.model, nn.CrossEntropyLoss(), parameters, data, **options)

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        rows = vec.reshape(-1, vec.shape[-1])
        return self.solve(self.operator, self.work, rows).reshape(vec.shape)


def curvlinops(
    work: Workload,
    queries: int,
    solve: Callable[..., Tensor],
    kind: str = "GGNLinearOperator",
    same: bool = True,
    **options: Any,
) -> Tensor:
    return ByCurvlinops(work, solve, kind, same, **options).influence_matrix(None, range(queries))


def by_its_cg(operator: Any, work: Workload, rows: Tensor, **options: Any) -> Tensor:
    """Its conjugate gradients, which are gpytorch's."""
    from curvlinops import CGInverseLinearOperator
    from curvlinops.examples import IdentityLinearOperator

    identity = IdentityLinearOperator([p.shape for p in work.model.parameters()], rows.device, rows.dtype)
    return (CGInverseLinearOperator(operator + ridge(work) * identity, **options) @ rows.mT).mT


def by_its_cg_same(operator: Any, work: Workload, rows: Tensor) -> Tensor:
    """It stops by the mean of the relative residuals, at 1000 iterations unless told more."""
    return by_its_cg(operator, work, rows, tolerance=work.rtol)


def by_scipy(operator: Any, work: Workload, rows: Tensor) -> Tensor:
    theirs, d = operator.to_scipy(), rows.shape[1]
    damped = scipy.sparse.linalg.LinearOperator(
        (d, d), matvec=lambda v: theirs @ v + ridge(work) * v, dtype=rows.numpy().dtype
    )
    solutions = [scipy.sparse.linalg.cg(damped, row.numpy(), rtol=work.rtol)[0] for row in rows]
    return torch.stack([torch.as_tensor(x, dtype=rows.dtype) for x in solutions])


def by_block_cg(operator: Any, work: Workload, rows: Tensor) -> Tensor:
    return block_cg(aslinearoperator(operator, rows).damped(ridge(work)), rows, rtol=work.rtol)[0]


def by_its_ekfac(operator: Any, work: Workload, rows: Tensor) -> Tensor:
    from curvlinops import KFACInverseLinearOperator

    return (KFACInverseLinearOperator(operator, damping=ridge(work), use_exact_damping=True) @ rows.mT).mT


# -- the table's lines -----------------------------------------------------------------------------------------------


def our_entries(name: str) -> list[Entry]:
    """Ours for one problem: Gauss-Newton, and the Hessian where that is another matrix."""
    lines = []
    for curvature in [GAUSS_NEWTON] if name == "B" else [GAUSS_NEWTON, HESSIAN]:
        what = "softmax regression's Hessian, as Gauss-Newton" if name == "B" else f"exact {curvature}"
        for method, how, scores in [
            ('InfluenceModule, solver="auto"', "to rtol", partial(module, solver="auto", curvature=curvature)),
            ("CGInfluenceModule", "conjugate gradients to rtol", partial(cg_module, curvature=curvature)),
            ('InfluenceModule, solver="direct"', "Cholesky", partial(module, solver="direct", curvature=curvature)),
        ]:
            computes = f"{what}; mean + damp; {how}"
            lines.append(Entry("torch-influence", "torch_influence", method, SAME, computes, scores, curvature))
    return lines


ALL_ONE = "all data one batch"
CURVLINOPS = "curvlinops-for-pytorch"
PEERS = [
    Entry(
        "torch-influence 0.1.0", "torch_influence", "its algorithm (baseline.py)", SAME,
        "exact Gauss-Newton; mean + damp; SciPy's CG to rtol", old_algorithm, GAUSS_NEWTON, queries=1,
    ),
    Entry(
        "pyDVL", "pydvl.influence.torch", "CgInfluence", DEFAULT,
        "mean Hessian, no damping, no regulariser; CG to 1e-4, one query after the other",
        partial(pydvl, kind="CgInfluence", same=False), exact=False,
    ),
    Entry(
        "pyDVL", "pydvl.influence.torch", "CgInfluence", SAME,
        f"mean Hessian + l2 + damp; CG to rtol, one query after the other, {ALL_ONE}",
        partial(pydvl, kind="CgInfluence", same=True), queries=10,
    ),
    Entry(
        "pyDVL", "pydvl.influence.torch", "CgInfluence, solve_simultaneously", SAME,
        f"mean Hessian + l2 + damp; block CG to rtol, {ALL_ONE}",
        partial(pydvl, kind="CgInfluence", same=True, solve_simultaneously=True),
    ),
    Entry(
        "pyDVL", "pydvl.influence.torch", "DirectInfluence", SAME,
        f"mean Hessian + l2 + damp; dense solve, {ALL_ONE}", partial(pydvl, kind="DirectInfluence", same=True),
    ),
    Entry(
        "captum", "captum.influence", "ArnoldiInfluenceFunction", DEFAULT,
        "Hessian's sum + 1e-3; 50 largest of 200 Arnoldi dimensions",
        partial(captum, kind="ArnoldiInfluenceFunction", same=False), exact=False,
    ),
    Entry(
        "captum", "captum.influence", "ArnoldiInfluenceFunction", SAME,
        f"Hessian's sum + n (l2 + damp); 50 largest of 200 Arnoldi dimensions; {ALL_ONE}",
        partial(captum, kind="ArnoldiInfluenceFunction", same=True), exact=False,
    ),
    Entry(
        "captum", "captum.influence", "NaiveInfluenceFunction", DEFAULT,
        "Hessian's sum + 1e-6; 50 largest eigenvalues",
        partial(captum, kind="NaiveInfluenceFunction", same=False), exact=False,
    ),
    Entry(
        "captum", "captum.influence", "NaiveInfluenceFunction, projection_dim=None", SAME,
        f"Hessian's sum + n (l2 + damp); all eigenvalues; {ALL_ONE}",
        partial(captum, kind="NaiveInfluenceFunction", same=True, projection_dim=None),
    ),
    Entry(
        "captum", "captum.influence", "TracInCP, one checkpoint", SAME,
        "products of gradients, no curvature; its size means nothing here", tracin, exact=False,
    ),
    Entry(
        "kronfluence", "kronfluence.analyzer", "EK-FAC", DEFAULT,
        "EK-FAC of the Fisher information, labels sampled, + 1e-8", partial(kronfluence, same=False),
        GAUSS_NEWTON, exact=False,
    ),
    Entry(
        "kronfluence", "kronfluence.analyzer", "EK-FAC", SAME,
        "EK-FAC of the Fisher information, labels sampled, + l2 + damp", partial(kronfluence, same=True),
        GAUSS_NEWTON, exact=False,
    ),
    Entry(
        "dattri", "dattri.algorithm.influence_function", "IFAttributorCG", DEFAULT,
        "sum over batches of 64 of their Hessians' inverses, no damping; 10 steps of CG",
        partial(dattri, kind="IFAttributorCG", same=False), exact=False,
    ),
    Entry(
        "dattri", "dattri.algorithm.influence_function", "IFAttributorCG, max_iter=40", SAME,
        f"mean Hessian + l2 + damp; 40 steps of CG (it has no tolerance), {ALL_ONE}",
        partial(dattri, kind="IFAttributorCG", same=True, max_iter=40),
    ),
    Entry(
        "dattri", "dattri.algorithm.influence_function", "IFAttributorExplicit", SAME,
        f"mean Hessian + l2 + damp; dense solve, {ALL_ONE}", partial(dattri, kind="IFAttributorExplicit", same=True),
    ),
    Entry(
        "dattri", "dattri.algorithm.influence_function", "IFAttributorEKFAC", DEFAULT,
        "EK-FAC of the empirical Fisher information, no damping",
        partial(dattri, kind="IFAttributorEKFAC", same=False), GAUSS_NEWTON, exact=False,
    ),
    Entry(
        "dattri", "dattri.algorithm.influence_function", "IFAttributorEKFAC", SAME,
        "EK-FAC of the empirical Fisher information, + l2 + damp",
        partial(dattri, kind="IFAttributorEKFAC", same=True), GAUSS_NEWTON, exact=False,
    ),
    Entry(
        CURVLINOPS, "curvlinops", "GGN, its CGInverseLinearOperator", DEFAULT,
        "exact Gauss-Newton; mean + l2 + damp; gpytorch's CG to its default, 1; scores by ours",
        partial(curvlinops, solve=by_its_cg, same=False), GAUSS_NEWTON, exact=False,
    ),
    Entry(
        CURVLINOPS, "curvlinops", "GGN, its CGInverseLinearOperator", SAME,
        f"exact Gauss-Newton; mean + l2 + damp; gpytorch's CG to rtol on average, {ALL_ONE}; scores by ours",
        partial(curvlinops, solve=by_its_cg_same), GAUSS_NEWTON,
    ),
    Entry(
        CURVLINOPS, "curvlinops", "GGN, SciPy's cg", SAME,
        f"exact Gauss-Newton; mean + l2 + damp; CG to rtol, one query after the other, {ALL_ONE}; scores by ours",
        partial(curvlinops, solve=by_scipy), GAUSS_NEWTON, queries=10,
    ),
    Entry(
        CURVLINOPS, "curvlinops", "GGN, our block_cg", SAME,
        f"exact Gauss-Newton; mean + l2 + damp; our block CG to rtol, {ALL_ONE}; scores by ours",
        partial(curvlinops, solve=by_block_cg), GAUSS_NEWTON,
    ),
    Entry(
        CURVLINOPS, "curvlinops", "EKFACLinearOperator, type-2", SAME,
        "EK-FAC of the Fisher information, no sampling, + l2 + damp; scores by ours",
        partial(curvlinops, solve=by_its_ekfac, kind="EKFACLinearOperator", fisher_type="type-2"),
        GAUSS_NEWTON, exact=False,
    ),
]  # fmt: skip

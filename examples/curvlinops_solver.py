"""Solvers for somebody else's matrix: a curvlinops curvature, our conjugate gradients, and its own.

What one learns: `torch_influence.solvers.cg(A, B)` takes any operator with `@`, with a right-hand side per row of B.
Damping belongs to the operator, and what a solve reached is in its report and not a matter of faith. curvlinops'
weight decay is not part of its operators: add it to the damping. Needs curvlinops-for-pytorch.

    python examples/curvlinops_solver.py
"""

import argparse
import sys

import torch
from torch import nn

from torch_influence import solvers
from torch_influence.linop import aslinearoperator

try:
    from curvlinops import CGInverseLinearOperator, GGNLinearOperator
    from curvlinops.examples import IdentityLinearOperator
except ImportError:
    sys.exit("this example needs curvlinops: pip install curvlinops-for-pytorch")

DAMP = 1e-2


def problem(hidden, queries):
    """The Gauss-Newton matrix of a network, and a gradient of the loss per query."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()
    data = [(torch.randn(32, 8, dtype=torch.float64), torch.randint(3, (32,))) for _ in range(4)]
    parameters = list(model.parameters())  # in the order of named_parameters(), as a module's rows are
    curvature = GGNLinearOperator(model, nn.CrossEntropyLoss(), parameters, data)
    gradients = []
    for _ in range(queries):
        loss = nn.functional.cross_entropy(model(torch.randn(1, 8, dtype=torch.float64)), torch.randint(3, (1,)))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    identity = IdentityLinearOperator([tuple(p.shape) for p in parameters], torch.device("cpu"), torch.float64)
    return curvature, identity, torch.stack(gradients)


def theirs(damped, rows, rtol):
    """Their CG takes columns; it stops when the mean of all residuals is below the tolerance."""
    smallest = torch.finfo(rows.dtype).tiny  # by default they take r'r < 1e-10 for zero
    inverse = CGInverseLinearOperator(damped, tolerance=rtol, eps=smallest, max_iter=10 * rows.shape[1])
    return (inverse @ rows.mT).mT


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=20, help="width of the network (default 20)")
    parser.add_argument("--queries", type=int, default=5)
    parser.add_argument("--rtol", type=float, default=1e-6)
    options = parser.parse_args()
    curvature, identity, rows = problem(options.hidden, options.queries)
    damped = aslinearoperator(curvature, rows).damped(DAMP)
    exact, _ = solvers.direct(damped, rows)  # the matrix, made dense and factored
    one_by_one, report = solvers.cg(damped, rows, rtol=options.rtol)
    together, block_report = solvers.block_cg(damped, rows, rtol=options.rtol)
    print(f"{len(rows)} right-hand sides, {rows.shape[1]} parameters, asked for residuals of {options.rtol:.0e}")
    print(f"{'':<24}{'|b - Ax| / |b|':>16}{'|x - x*| / |x*|':>18}{'products':>11}")
    other = theirs(curvature + DAMP * identity, rows, options.rtol)
    solutions = {"curvlinops' CG": other, "cg": one_by_one, "block_cg": together}
    products = {"cg": report.products, "block_cg": block_report.products}
    for name, x in solutions.items():
        residual = ((rows - damped.product(x)).norm(dim=1) / rows.norm(dim=1)).max()
        error = ((x - exact).norm(dim=1) / exact.norm(dim=1)).max()
        print(f"{name:<24}{residual:>16.1e}{error:>18.1e}{products.get(name, '-'):>11}")


if __name__ == "__main__":
    main()

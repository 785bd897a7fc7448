from __future__ import annotations

import pytest
import torch
from contract import Contract, assert_within, on_devices, unit_roundoff

from torch_influence.ops import CGScalars, cg_step
from torch_influence.ops._cg_step import reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WHOLE, MOVE, TURN = range(3)  # which call; the last two with a preconditioner
GOES_ON, AT_REST, DONE, BREAKS_DOWN, STARTS = range(5)  # what a row does, in turn

implementations = pytest.mark.parametrize("implementation", [cg_step, reference], ids=["cg_step", "reference"])


def arguments(shape, dtype, device):
    """q and z are p and r with every entry scaled by about 1, so that no dot product cancels."""
    k, d, call = shape
    x, r, p = torch.randn(3, k, d, dtype=torch.float64).to(dtype).unbind()
    weights = 0.5 + torch.rand(k, d, dtype=torch.float64)
    what = torch.arange(k) % 5
    scalars = torch.zeros(9, k, dtype=torch.float64)
    row = CGScalars(*scalars)
    row.active.copy_(what != AT_REST)
    row.tolerance[what == DONE] = 1e30
    row.rho.copy_((1 + r.double().square().sum(1)) * (what != STARTS))
    row.largest.copy_(torch.arange(k) % 2 * 1e-3)
    given = ((r if call == TURN else p).double() * weights).to(dtype)
    given[(what == BREAKS_DOWN) & (call != TURN)] = 0  # p'Ap = 0
    x, r, p, scalars, given = (t.clone().to(device) for t in (x, r, p, scalars, given))
    q, z = (None, given) if call == TURN else (given, None)
    return {"x": x, "r": r, "p": p, "scalars": scalars, "q": q, "z": z, "preconditioned": call != WHOLE}


def bound(call):
    """First-order error analysis of each line, both sides counted; what differs by more than rounding fails.

    A dot product of d terms of one sign is summed in float64 with a relative error of at most (d + 1)u, products
    included; α and β are rounded to the rows' arithmetic; a·y and the sum with it round once each, storing 16-bit rows
    once more. Rows at rest, and what a call has no business with, must not differ at all.
    """
    x, r, p = (call[name].double() for name in ("x", "r", "p"))
    row = CGScalars(*call["scalars"])
    stored, wide = call["x"].dtype, torch.promote_types(call["x"].dtype, torch.float32)
    u_double, u_wide = unit_roundoff(torch.float64), unit_roundoff(wide)
    u_stored = unit_roundoff(stored) if stored != wide else 0.0
    second_order = 1 + 8 * (u_wide + u_stored)
    dot = 2 * (x.shape[1] + 4) * u_double

    def moved(base, base_error, length, length_error, along):
        """Of base + length·along, with errors of base and of length."""
        term = length.abs()[:, None] * along.abs()
        rounding = 2 * u_wide * term + 2 * (u_wide + u_stored) * (base.abs() + term)
        spacing = 2 * unit_roundoff(stored) * torch.finfo(stored).smallest_normal  # below the normal range
        return (base_error + length_error[:, None] * along.abs() + rounding + spacing) * second_order

    def turned(which, base, base_error, rho, rho_error):
        """Of p, and of ρ."""
        start = row.rho == 0
        beta = torch.where(start, 0.0, rho / row.rho)
        beta_error = torch.where(start, 0.0, rho_error / row.rho + (2 * u_wide + 4 * u_double) * beta)
        p_error = torch.where(start[:, None], base_error, moved(base, base_error, beta, beta_error, p))
        return p_error * which[:, None], rho_error * which

    errors = CGScalars(*torch.zeros_like(call["scalars"]))
    active = row.active != 0
    if call["z"] is not None:
        z = call["z"].double()
        rho = (r * z).sum(1)
        p_error, rho_error = turned(active, z, torch.zeros_like(z), rho, dot * rho)
        errors.rho.copy_(rho_error)
        return torch.zeros_like(x), torch.zeros_like(x), p_error, torch.stack(errors)

    q = call["q"].double()
    curvature = (p * q).sum(1)
    stepping = active & (curvature > 0)
    alpha = torch.where(stepping, row.rho / curvature, 0.0)
    alpha_error = (dot + 4 * u_double + 2 * u_wide) * alpha
    zero = torch.zeros_like(x)
    x_error = moved(x, zero, alpha, alpha_error, p) * stepping[:, None]
    r_error = moved(r, zero, alpha, alpha_error, q) * stepping[:, None]
    new_r = r - alpha[:, None] * q
    residual = new_r.square().sum(1)
    size = new_r.abs() + r_error
    residual_error = (2 * size * r_error).sum(1) + dot * size.square().sum(1)
    errors.alpha.copy_(alpha_error)
    errors.curvature.copy_(dot * curvature * active)
    errors.residual.copy_(residual_error * stepping)
    errors.largest.copy_(((2 * dot + 4 * u_double) * q.square().sum(1) / p.square().sum(1)).nan_to_num() * stepping)
    p_error = zero
    if not call["preconditioned"]:
        goes_on = stepping & (row.tolerance == 0)
        p_error, rho_error = turned(goes_on, new_r, r_error, residual, residual_error)
        errors.rho.copy_(rho_error)
    return x_error, r_error, p_error, torch.stack(errors)


def changed(**changes):
    return {**arguments((2, 3, WHOLE), torch.float32, "cpu"), **changes}


CONTRACT = Contract(
    arguments=arguments,
    # A CPU block has 16384 columns, and a row of more than two of them is shared by the threads; a CUDA block has 2048
    # to 8192 or, in rows of some millions, more. Rows of "packs" are multiples of 16 bytes.
    shapes={
        "usual": (6, 256, WHOLE),
        "empty": (0, 5, WHOLE),
        "no_columns": (5, 0, WHOLE),
        "one_row": (1, 1000, WHOLE),
        "one_element": (1, 1, WHOLE),
        "odd": (7, 1237, WHOLE),
        "long": (1, 100_003, WHOLE),
        "many": (6, 40_001, WHOLE),
        "many_short": (300, 33, WHOLE),
        "move": (6, 1237, MOVE),
        "long_move": (6, 40_001, MOVE),
        "turn": (6, 1237, TURN),
        "long_turn": (6, 40_001, TURN),
        "turn_no_columns": (2, 0, TURN),
        "packs": (5, 4104, WHOLE),
        "packs_move": (5, 4104, MOVE),
        "packs_turn": (5, 4104, TURN),
        "rows_beyond_a_grid": (65_540, 8, WHOLE),
        "columns_beyond_a_grid": (1, 4_200_007, WHOLE),
    },
    dtypes=DTYPES,
    written=("x", "r", "p", "scalars"),
    bound=bound,
    wrong={
        "x no tensor": (changed(x=[[1.0]]), TypeError, "x: expected a tensor, got list"),
        "x integer": (changed(x=torch.ones(2, 3, dtype=torch.int64)), TypeError, "x: expected dtype .* torch.int64"),
        "x one row": (changed(x=torch.ones(3)), ValueError, r"x: expected 2 dimensions, got shape \(3,\)"),
        "x with gradient": (changed(x=torch.ones(2, 3, requires_grad=True)), ValueError, "x: .*without gradient"),
        "x expanded": (changed(x=torch.ones(1, 3).expand(2, 3)), ValueError, "x: expected a tensor with memory of its"),
        "r expanded": (changed(r=torch.ones(2, 1).expand(2, 3)), ValueError, "r: expected a tensor with memory of its"),
        "p expanded": (changed(p=torch.ones(1, 3).expand(2, 3)), ValueError, "p: expected a tensor with memory of its"),
        "r of other shape": (changed(r=torch.ones(2, 4)), ValueError, r"r: expected shape \(2, 3\), .* got \(2, 4\)"),
        "p of other dtype": (changed(p=torch.ones(2, 3).double()), TypeError, "p: .*float32.* got torch.float64"),
        "p elsewhere": (changed(p=torch.ones(2, 3, device="meta")), ValueError, "p: expected device cpu.* got meta"),
        "q of other shape": (changed(q=torch.ones(1, 3)), ValueError, r"q: expected shape \(2, 3\), .* got \(1, 3\)"),
        "q with gradient": (changed(q=torch.ones(2, 3, requires_grad=True)), ValueError, "q: .*without gradient"),
        "z of other dtype": (
            changed(q=None, z=torch.ones(2, 3).half(), preconditioned=True),
            TypeError,
            "z: expected dtype torch.float32, .* got torch.float16",
        ),
        "z alone without preconditioner": (
            changed(q=None, z=torch.ones(2, 3)),
            ValueError,
            "z: expected None without a preconditioner",
        ),
        "q and z": (changed(z=torch.ones(2, 3)), ValueError, "q, z: expected one of them, got both"),
        "neither q nor z": (changed(q=None), ValueError, "q, z: expected one of them, got none"),
        "scalars of other dtype": (
            changed(scalars=torch.ones(9, 2)),
            TypeError,
            "scalars: expected dtype torch.float64, got torch.float32",
        ),
        "scalars of other shape": (
            changed(scalars=torch.ones(9, 3, dtype=torch.float64)),
            ValueError,
            r"scalars: expected shape \(9, 2\), got \(9, 3\)",
        ),
        "scalars elsewhere": (
            changed(scalars=torch.ones(9, 2, dtype=torch.float64, device="meta")),
            ValueError,
            "scalars: expected device cpu.* got meta",
        ),
    },
)


def started(rows, tolerance=0.0):
    """x = 0, r = p = b and the scalars of k rows."""
    scalars = torch.zeros(9, len(rows), dtype=torch.float64, device=rows.device)
    row = CGScalars(*scalars)
    row.active.fill_(1)
    row.tolerance.fill_(tolerance)
    row.rho.copy_(rows.double().square().sum(1))
    return {"x": torch.zeros_like(rows), "r": rows.clone(), "p": rows.clone(), "scalars": scalars}


@on_devices
@implementations
def test_by_hand(implementation, device):
    b = torch.tensor([[1.0, 1.0]], device=device)
    state = started(b)
    implementation(**state, q=torch.tensor([[1.0, 3.0]], device=device))  # A = diag(1, 3)
    assert state["x"].tolist() == [[0.5, 0.5]]  # α = 2/4
    assert state["r"].tolist() == [[0.5, -0.5]]
    assert state["p"].tolist() == [[0.75, -0.25]]  # β = 0.5/2
    row = CGScalars(*state["scalars"].squeeze(1).tolist())
    assert row == CGScalars(
        active=1, tolerance=0, rho=0.5, alpha=0.5, curvature=4, residual=0.5, negative=0, largest=5, iterations=1
    )


@on_devices
@implementations
def test_by_hand_with_a_preconditioner(implementation, device):
    b = torch.tensor([[1.0, 1.0]], device=device)
    state = started(b)
    state["scalars"][2] = 0  # ρ = 0: a start
    state["p"].fill_(float("nan"))
    z = torch.tensor([[1.0, 0.5]], device=device)  # M = diag(1, 1/2)
    implementation(**state, z=z, preconditioned=True)
    assert state["p"].tolist() == z.tolist()
    implementation(**state, q=torch.tensor([[1.0, 1.0]], device=device), preconditioned=True)  # A = diag(1, 2)
    assert state["x"].tolist() == z.tolist()  # ρ = p'q = 1.5
    assert state["r"].tolist() == [[0.0, 0.0]]
    assert state["p"].tolist() == z.tolist()
    row = CGScalars(*state["scalars"].squeeze(1).tolist())
    assert row[:-2] == (0, 0, 1.5, 1, 1.5, 0, 0)  # at rest: r = 0 is within a tolerance of 0
    assert row.largest == pytest.approx(2 / 1.25)


def positive_definite(d, device):
    orthogonal = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    return (orthogonal * torch.linspace(1, 10, d, dtype=torch.float64) @ orthogonal.mT).to(device)


@on_devices
@implementations
@pytest.mark.parametrize("preconditioned", [False, True])
def test_iterations_solve(implementation, preconditioned, device):
    """As many steps as the error bound 2 ((√κ-1)/(√κ+1))^m asks for."""
    d, condition, tolerance = 40, 10.0, 1e-12
    matrix = positive_definite(d, device)
    inverse_diagonal = (1 / matrix.diagonal()) if preconditioned else torch.ones(d, device=device)
    b = torch.randn(5, d, dtype=torch.float64).to(device)
    state = started(b, tolerance)
    if preconditioned:
        state["scalars"][2] = 0
        condition *= 10  # of the scaled matrix at most
    rate = (condition**0.5 - 1) / (condition**0.5 + 1)
    steps = 0
    error = 2 * condition * b.norm(dim=1).max().item()
    while error > tolerance:
        if preconditioned:
            implementation(**state, z=state["r"] * inverse_diagonal, preconditioned=True)
        implementation(**state, q=state["p"] @ matrix, preconditioned=preconditioned)
        error *= rate
        steps += 1
    row = CGScalars(*state["scalars"])
    assert (row.active == 0).all()
    assert (row.iterations <= steps).all()
    assert (row.residual.sqrt() <= tolerance).all()
    assert (row.largest.sqrt() <= 10 * (1 + d * unit_roundoff(torch.float64))).all()
    assert (row.negative == 0).all()
    rounding = steps * d * condition * unit_roundoff(torch.float64) * b.norm(dim=1)
    expected = torch.linalg.solve(matrix, b.mT).mT
    assert ((state["x"] - expected).norm(dim=1) <= tolerance + rounding).all()


@on_devices
@implementations
def test_rows_at_rest_keep_every_bit(implementation, device):
    call = arguments((10, 20_000, WHOLE), torch.float32, device)
    at_rest = torch.arange(10) % 5 == AT_REST
    call["q"][at_rest] = float("nan")
    before = {name: call[name].clone() for name in CONTRACT.written}
    implementation(**call)
    for name, value in before.items():
        which = (..., at_rest) if name == "scalars" else at_rest
        assert torch.equal(call[name][which], value[which])


@on_devices
@implementations
def test_a_row_that_is_done_gets_its_last_step_and_no_direction(implementation, device):
    call = arguments((5, 20_000, WHOLE), torch.float64, device)
    before = {name: call[name].clone() for name in CONTRACT.written}
    implementation(**call)
    row, old = CGScalars(*call["scalars"]), CGScalars(*before["scalars"])
    assert row.active[DONE] == 0
    assert torch.equal(call["p"][DONE], before["p"][DONE])
    assert row.rho[DONE] == old.rho[DONE]
    assert row.iterations[DONE] == 1
    residual = call["r"][DONE].square().sum()
    assert row.residual[DONE].item() == pytest.approx(residual.item(), rel=2 * 20_000 * unit_roundoff(torch.float64))
    assert not torch.equal(call["x"][DONE], before["x"][DONE])


@on_devices
@implementations
@pytest.mark.parametrize("call", [WHOLE, MOVE])
@pytest.mark.parametrize("value", [0.0, float("inf"), float("-inf"), float("nan")])
def test_a_row_that_breaks_down_is_left_as_it_is(implementation, value, call, device):
    call = arguments((3, 20_000, call), torch.float32, device)
    if value == 0:
        call["q"][0] = 0
    else:
        call["q"][0, 19_999] = value
    before = {name: call[name].clone() for name in CONTRACT.written}
    implementation(**call)
    row = CGScalars(*call["scalars"])
    assert row.active.tolist() == [0, 0, 0]  # 1 was at rest, 2 is done
    assert row.iterations.tolist() == [0, 0, 1]
    assert row.alpha[0] == 0
    for name in ("x", "r", "p"):
        assert torch.equal(call[name][0], before[name][0])


@on_devices
@implementations
def test_a_step_too_long_for_the_dtype_breaks_down(implementation, device):
    state = started(torch.full((1, 8), 1e-3, device=device))
    implementation(**state, q=torch.full((1, 8), 1e-44, device=device))
    assert state["x"].tolist() == [[0.0] * 8]
    assert state["scalars"][0].item() == 0


@on_devices
@implementations
def test_negative_curvature_is_remembered_and_iterated_on(implementation, device):
    state = started(torch.tensor([[1.0, 1.0], [1.0, 1.0]], device=device))
    implementation(**state, q=torch.tensor([[-1.0, -3.0], [1.0, 3.0]], device=device))
    row = CGScalars(*state["scalars"])
    assert row.negative.tolist() == [1, 0]
    assert row.active.tolist() == [1, 1]
    assert state["x"].tolist() == [[-0.5, -0.5], [0.5, 0.5]]
    implementation(**state, q=state["p"].clone())
    assert CGScalars(*state["scalars"]).negative.tolist() == [1, 0]


@on_devices
@implementations
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_float32_rows_whose_squares_leave_float32(implementation, size, device):
    b = torch.full((1, 64), size, device=device)
    state = started(b, 0.1 * size)
    implementation(**state, q=2 * state["p"])  # A = 2: one step solves
    assert state["scalars"][0].item() == 0
    assert state["x"][0].tolist() == pytest.approx([0.5 * size] * 64, rel=4 * unit_roundoff(torch.float32))


@on_devices
@implementations
def test_q_may_be_p_and_z_may_be_r(implementation, device):
    b = torch.randn(2, 1237, dtype=torch.float64).to(device)
    state = started(b)
    implementation(**state, q=state["p"])  # A = 1
    exact = 4 * 1237 * unit_roundoff(torch.float64) * b.abs()
    assert_within(state["x"], b, exact)
    state = started(b)
    state["scalars"][2] = 0
    state["p"].zero_()
    implementation(**state, z=state["r"], preconditioned=True)
    assert torch.equal(state["p"], b)


@pytest.mark.parametrize("call", [WHOLE, MOVE, TURN])
@pytest.mark.parametrize("d", [1237, 40_001])
def test_a_row_comes_out_the_same_alone_and_among_others(d, call):
    together = arguments((7, d, call), torch.float32, "cpu")
    alone = {name: v[..., :1].clone() if name == "scalars" else v[:1].clone() if isinstance(v, torch.Tensor) else v
             for name, v in together.items()}  # fmt: skip
    cg_step(**together)
    cg_step(**alone)
    for name in CONTRACT.written:
        which = (..., slice(1)) if name == "scalars" else slice(1)
        assert torch.equal(together[name][which], alone[name])


@on_devices
@implementations
def test_rows_at_rest_stay_there_whatever_their_product(implementation, device):
    call = arguments((10, 40, WHOLE), torch.float64, device)
    at_rest = torch.arange(10) % 5 == AT_REST
    assert call["q"][at_rest].isfinite().all()
    before = {name: call[name].clone() for name in CONTRACT.written}
    implementation(**call)
    for name, value in before.items():
        which = (..., at_rest) if name == "scalars" else at_rest
        assert torch.equal(call[name][which], value[which])

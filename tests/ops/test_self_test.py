from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import torch_influence
from torch_influence import backend_info, ops
from torch_influence.__main__ import main


def test_every_op_passes_on_every_device_and_dtype() -> None:
    outcome = torch_influence.self_test()
    assert outcome.passed, str(outcome)
    devices = 2 if torch.cuda.is_available() else 1
    assert len(outcome.checks) == 4 * len(ops.OPS) * devices
    runs = "native" if backend_info().ops else "reference"
    assert all(check.runs == runs for check in outcome.checks if check.device == "cpu")


@pytest.mark.parametrize("garbage", [0.0, 1.1, math.nan], ids=["zeros", "a tenth too large", "nan"])
def test_an_op_that_returns_garbage_fails(
    garbage: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = ops.lissa_step

    def wrong(h: Tensor, v: Tensor, hvp: Tensor, damp: float, scale: float) -> Tensor:
        norms = right(h, v, hvp, damp, scale)
        h.mul_(garbage)
        return norms

    monkeypatch.setattr(ops, "lissa_step", wrong)
    outcome = torch_influence.self_test()
    assert [check.op for check in outcome.checks if not check.passed] == ["lissa_step"] * (
        len(outcome.checks) // len(ops.OPS)
    )
    assert main(["selftest"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_the_command_prints_a_table_and_succeeds(capsys: pytest.CaptureFixture) -> None:
    assert main(["selftest"]) == 0
    output = capsys.readouterr().out
    assert "0 failed" in output
    for op in ops.OPS:
        assert op in output

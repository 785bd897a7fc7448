"""What holds for every op. Ops are found by their registered schemas, so a new one is under test from its first day."""

from __future__ import annotations

import importlib
import inspect
import shutil
from pathlib import Path

import pytest
import torch
from contract import Contract, as_tuple, assert_within, copy_of, needs_native, on_devices
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_influence.ops
from torch_influence import backend_info

ROOT = Path(__file__).parents[2]
REGISTERED = sorted(
    name.removeprefix("torch_influence::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("torch_influence::")
)


def module_of(op: str):
    return importlib.import_module(f"torch_influence.ops._{op}")


def wrapper_of(op: str):
    return getattr(torch_influence.ops, op)


def native_of(op: str):
    return getattr(torch.ops.torch_influence, op)


def contract_of(op: str) -> Contract:
    return importlib.import_module(f"test_{op}").CONTRACT


every_op = pytest.mark.parametrize("op", REGISTERED)
pytestmark = needs_native


def cases(shapes: list[str] | None = None):
    """(op, dtype, shape) for the ops that are registered."""
    return pytest.mark.parametrize(
        ("op", "dtype", "shape"),
        [
            pytest.param(op, dtype, shape, id=f"{op}-{str(dtype).removeprefix('torch.')}-{shape}")
            for op in REGISTERED
            for dtype in contract_of(op).dtypes
            for shape in shapes or contract_of(op).shapes
        ],
    )


def test_the_registered_ops_are_those_of_the_build():
    assert tuple(REGISTERED) == backend_info().ops == torch_influence.ops.OPS


@every_op
def test_every_part_is_in_its_place(op):
    sources = ROOT / "csrc" / "ops" / op
    for path in (sources / f"{op}.h", sources / f"{op}.cpp"):
        assert path.is_file(), f"{path.relative_to(ROOT)} is missing"
    for path in (f"tests/ops/test_{op}.py", f"benchmarks/ops/bench_{op}.py"):
        assert (ROOT / path).is_file(), f"{path} is missing"
    assert callable(wrapper_of(op)), f"torch_influence.ops doesn't export {op}"
    assert wrapper_of(op).__doc__
    assert {"usual", "empty", "one_row", "odd", "packs"} <= set(contract_of(op).shapes)


@every_op
def test_wrapper_reference_fake_and_schema_take_the_same_arguments(op):
    schema = [argument.name for argument in native_of(op).default._schema.arguments]
    for function in (wrapper_of(op), module_of(op).reference, module_of(op).fake):
        assert list(inspect.signature(function).parameters) == schema


@every_op
def test_written_arguments_are_those_of_the_schema(op):
    schema = native_of(op).default._schema.arguments
    written = tuple(argument.name for argument in schema if argument.alias_info and argument.alias_info.is_write)
    assert written == contract_of(op).written


@on_devices
@cases()
def test_native_equals_reference(op, dtype, shape, device):
    """And gives the same bits each time, whatever the number of threads."""
    native_equals_reference(op, dtype, shape, device, (1, 3) if device == "cpu" else ())


def native_equals_reference(op, dtype, shape, device, counts_of_threads):
    contract = contract_of(op)
    arguments = contract.arguments(contract.shapes[shape], dtype, device)
    bounds = contract.bound(arguments)
    expected = contract.run(module_of(op).reference, arguments)
    native = contract.run(wrapper_of(op), arguments)
    assert len(native) == len(expected) == len(bounds)
    for actual, reference, bound in zip(native, expected, bounds, strict=True):
        assert_within(actual, reference, bound)
    before = torch.get_num_threads()
    for threads in dict.fromkeys((before, *counts_of_threads)):
        torch.set_num_threads(threads)
        try:
            again = contract.run(wrapper_of(op), arguments)
        finally:
            torch.set_num_threads(before)
        for first, repeated, bound in zip(native, again, bounds, strict=True):
            if contract.uses_blas and threads != before:  # it may sum in another order: that isn't in our hands
                assert_within(repeated, first, bound)
            else:
                assert torch.equal(first, repeated)


@cases()
def test_shapes_are_known_without_numbers(op, dtype, shape):
    """On meta tensors, which go to the reference, and on fake ones, for which the op's fake answers."""
    contract = contract_of(op)
    arguments = contract.arguments(contract.shapes[shape], dtype, "cpu")
    expected = [like(t, "cpu") for t in contract.run(wrapper_of(op), arguments)]
    for function in (wrapper_of(op), module_of(op).reference):
        on_meta = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
        assert [like(t, "cpu") for t in contract.run(function, on_meta)] == expected
        assert all(t.is_meta for t in contract.run(function, on_meta))
        with FakeTensorMode() as mode:
            fakes = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
            assert [like(t, t.device.type) for t in contract.run(function, fakes)] == expected


def like(t, device):
    return t.shape, t.stride(), t.dtype, device


LAYOUTS = {
    "columns strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() >= 2 else t,
    "rows apart": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
    "rows a column apart": lambda t: torch.nn.functional.pad(t, (0, 1))[..., : t.shape[-1]] if t.dim() >= 2 else t,
    "unaligned": lambda t: moved(t, 1),
    "aligned to 8 bytes": lambda t: moved(t, 8 // t.element_size()),
}


def moved(t: torch.Tensor, elements: int) -> torch.Tensor:
    """A copy that begins so many elements after where memory is allocated."""
    return torch.cat([t.new_zeros(elements), t.flatten()])[elements:].view(t.shape)


@on_devices
@pytest.mark.parametrize("layout", LAYOUTS)
@cases(["odd", "packs"])
def test_any_memory_layout(op, dtype, shape, layout, device):
    contract = contract_of(op)
    arguments = contract.arguments(contract.shapes[shape], dtype, device)
    bounds = contract.bound(arguments)
    expected = contract.run(module_of(op).reference, arguments)
    tensors = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    for changed in [*([name] for name in tensors), tensors]:
        # Without contract.run, whose copies would lose the layout's gaps.
        call = {
            name: LAYOUTS[layout](value) if name in changed else copy_of(value) for name, value in arguments.items()
        }
        results = as_tuple(wrapper_of(op)(**call))
        for actual, reference, bound in zip(
            (*(call[name] for name in contract.written), *results), expected, bounds, strict=True
        ):
            assert_within(actual, reference, bound)


@on_devices
@cases(["usual", "empty"])
def test_opcheck(op, dtype, shape, device):
    contract = contract_of(op)
    arguments = contract.arguments(contract.shapes[shape], dtype, device)
    torch.library.opcheck(native_of(op).default, (), arguments)


@cases(["usual"])
def test_compiles_without_graph_breaks(op, dtype, shape):
    contract = contract_of(op)
    arguments = contract.arguments(contract.shapes[shape], dtype, "cpu")
    torch.compiler.reset()
    compiled = torch.compile(wrapper_of(op), fullgraph=True, backend="aot_eager")
    for first, second in zip(contract.run(compiled, arguments), contract.run(wrapper_of(op), arguments), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_compiles_with_inductor():
    """All ops in one function, since the compiler takes its time."""
    calls = {op: contract_of(op).arguments(contract_of(op).shapes["usual"], torch.float32, "cpu") for op in REGISTERED}

    def every_op(calls):
        return [result for op, call in calls.items() for result in as_tuple(wrapper_of(op)(**call))]

    def outcome(function):
        copies = {op: {name: copy_of(value) for name, value in call.items()} for op, call in calls.items()}
        results = function(copies)
        return [*results, *(copies[op][name] for op in REGISTERED for name in contract_of(op).written)]

    torch.compiler.reset()
    for first, second in zip(outcome(torch.compile(every_op, fullgraph=True)), outcome(every_op), strict=True):
        assert torch.equal(first, second)


@cases(["usual"])
def test_written_arguments_count_a_version(op, dtype, shape):
    contract = contract_of(op)
    arguments = contract.arguments(contract.shapes[shape], dtype, "cpu")
    before = {name: arguments[name]._version for name in contract.written}
    wrapper_of(op)(**arguments)
    for name, version in before.items():
        assert arguments[name]._version > version, f"autograd can't see that {name} was written"


@pytest.mark.parametrize(
    ("op", "what"), [pytest.param(op, what, id=f"{op}-{what}") for op in REGISTERED for what in contract_of(op).wrong]
)
def test_wrong_arguments_are_named(op, what):
    arguments, exception, message = contract_of(op).wrong[what]
    written = [arguments[name] for name in contract_of(op).written if isinstance(arguments.get(name), torch.Tensor)]
    written = [tensor for tensor in written if tensor.device.type != "meta"]
    before = [tensor.clone() for tensor in written]
    with pytest.raises(exception, match=message):
        wrapper_of(op)(**arguments)
    for tensor, copy in zip(written, before, strict=True):  # all is checked before anything is written
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("what", ["expanded", "other shape", "other dtype"])
@every_op
def test_the_op_itself_protects_memory(op, what):
    """Since the wrappers call it with arguments that nobody has checked."""
    contract = contract_of(op)
    arguments = contract.arguments(contract.shapes["usual"], torch.float32, "cpu")
    written = contract.written[-1]
    wrong = {
        "expanded": lambda t: t[:1].expand(t.shape),
        "other shape": lambda t: t[..., :-1],
        "other dtype": lambda t: t.half(),
    }[what](arguments[written])
    before = wrong.clone()
    with pytest.raises((RuntimeError, ValueError), match="expected"):
        native_of(op)(**arguments | {written: wrong})
    torch.testing.assert_close(wrong, before, rtol=0, atol=0, equal_nan=True)


@every_op
def test_parameters_and_subclasses_are_taken(op):
    """Though they aren't handed to the op unchecked."""
    contract = contract_of(op)
    arguments = contract.arguments(contract.shapes["usual"], torch.float32, "cpu")
    expected = contract.run(wrapper_of(op), arguments)
    given = {
        name: torch.nn.Parameter(value.clone(), requires_grad=False) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    results = as_tuple(wrapper_of(op)(**given))
    for actual, first in zip((*(given[name] for name in contract.written), *results), expected, strict=True):
        assert torch.equal(actual, first)


@pytest.mark.cuda
@cases(["usual", "odd"])
def test_runs_on_the_current_stream(op, dtype, shape):
    contract = contract_of(op)
    arguments = contract.arguments(contract.shapes[shape], dtype, "cuda")
    expected = contract.run(wrapper_of(op), arguments)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Were the op on another stream it would read the arguments before this one has filled them.
        late = {name: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
        torch.cuda._sleep(50_000_000)
        for name, value in late.items():
            if isinstance(value, torch.Tensor):
                value.copy_(arguments[name])
        results = contract.run(wrapper_of(op), late)
    stream.synchronize()
    for actual, first in zip(results, expected, strict=True):
        assert torch.equal(actual, first)


@pytest.mark.cuda
@cases(["usual", "odd", "one_row"])
def test_can_be_captured_and_never_synchronises(op, dtype, shape):
    contract = contract_of(op)
    arguments = contract.arguments(contract.shapes[shape], dtype, "cuda")
    expected = contract.run(wrapper_of(op), arguments)
    static = {name: copy_of(value) for name, value in arguments.items()}
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            results = as_tuple(wrapper_of(op)(**static))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(2):
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                static[name].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        for actual, first in zip((*(static[name] for name in contract.written), *results), expected, strict=True):
            assert torch.equal(actual, first)

"""Products of large matrices of our own: those of torch, within rounding, in every layout."""

import pytest
import torch

from lightning_accel.machine import large_products
from lightning_accel.recurrent import LayerNormLSTMCell, Recurrent
from lightning_accel.recurrent.compiler import compile_source


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(16, 16, 16), (23, 40, 65), (64, 1500, 33), (9, 3, 40)])
@pytest.mark.parametrize("turned", [False, True])
def test_products_are_those_of_torch(rows, inner, columns, turned, dtype):
    a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    if turned:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    first, close = torch.randn(rows, columns, dtype=dtype), 1e-3 if dtype is torch.float32 else 1e-10
    room = torch.full((rows, columns + 3), 7.0, dtype=dtype)
    assert large_products.multiply(a, b, out=room[:, :columns]).data_ptr() == room.data_ptr()
    torch.testing.assert_close(room[:, :columns], a @ b, rtol=close, atol=close)
    assert (room[:, columns:] == 7.0).all()
    torch.testing.assert_close(large_products.multiply(a, b), a @ b, rtol=close, atol=close)
    torch.testing.assert_close(large_products.add_multiplied(first, a, b), first + a @ b, rtol=close, atol=close)
    total = large_products.add_product(None, a, b)
    assert large_products.add_product(total, a, b) is total
    torch.testing.assert_close(total, 2 * (a @ b), rtol=close, atol=close)


def test_schedules_with_them_compute_the_same(monkeypatch):
    monkeypatch.setattr(large_products, "are_worth_it", lambda: True)
    used = []
    monkeypatch.setattr(
        compile_source.large_products, "multiply", lambda *args, **kwargs: used.append(1) or _multiply(*args, **kwargs)
    )
    cell, x = LayerNormLSTMCell(20, 24).double(), torch.randn(12, 3, 20, dtype=torch.double, requires_grad=True)
    found = []
    for schedule in ("loop", "compiled"):
        rnn = Recurrent(cell, schedule=schedule)
        y, _ = rnn(x, cell.initial_state(x[0]))
        found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *cell.parameters()])])
    assert used
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-10)


_multiply = large_products.multiply

"""Sums over chunks of rows against the same sum over the whole matrix.

Shapes: N rows, M columns, D width.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer import row_chunks as module
from trainer.row_chunks import row_chunks, sum_over_rows


def tensors(rows: int, columns: int, width: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    x_ND = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    y_MD = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    weight_N = torch.rand(rows, generator=generator, dtype=torch.float64)
    return x_ND.requires_grad_(), y_MD.requires_grad_(), weight_N.requires_grad_()


def term(start: int, x_RD: Tensor, weight_R: Tensor, y_MD: Tensor) -> tuple[Tensor, Tensor]:
    """A sum in which each row counts by its number, and how many products are positive."""
    product_RM = x_RD @ y_MD.T
    number_R = torch.arange(start, start + len(x_RD), dtype=x_RD.dtype)
    by_row_R = product_RM.tanh().sum(dim=1) * weight_R * number_R
    return by_row_R.sum(), (product_RM > 0).sum()


@given(st.integers(0, 50), st.integers(1, 50), st.integers(1, 300))
def test_row_chunks_cover_each_row_once_and_hold_their_bound(
    rows: int, columns: int, values: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_VALUES", values)
        parts = list(row_chunks(rows, columns))
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    for part in parts:
        length = part.stop - part.start
        assert length == 1 or length * columns <= values


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 100))
def test_values_counts_and_gradients_are_those_of_the_whole(
    rows: int, columns: int, values: int
) -> None:
    x_ND, y_MD, weight_N = tensors(rows, columns)
    expected, count = term(0, x_ND, weight_N, y_MD)
    wanted = torch.autograd.grad(3 * expected, (x_ND, y_MD, weight_N))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_VALUES", values)
        total, found_count = sum_over_rows(term, [x_ND, weight_N], [y_MD])
    torch.testing.assert_close(total, expected)
    assert found_count == count
    assert not found_count.requires_grad
    found = torch.autograd.grad(3 * total, (x_ND, y_MD, weight_N))
    torch.testing.assert_close(found, wanted)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_VALUES", 12)


def test_a_tensor_that_is_both_rows_and_whole_gets_both_gradients(small_chunks: None) -> None:
    x_ND, _, _ = tensors(7, 1)

    def own(start: int, x_RD: Tensor, x_ND: Tensor) -> tuple[Tensor]:
        return ((x_RD @ x_ND.T).sin().sum(),)

    (total,) = sum_over_rows(own, [x_ND], [x_ND])
    (found,) = torch.autograd.grad(total, x_ND)
    (wanted,) = torch.autograd.grad((x_ND @ x_ND.T).sin().sum(), x_ND)
    torch.testing.assert_close(found, wanted)


def test_only_what_requires_a_gradient_gets_one(small_chunks: None) -> None:
    x_ND, y_MD, weight_N = tensors(7, 5)
    total, _ = sum_over_rows(term, [x_ND.detach(), weight_N], [y_MD.detach()])
    total.backward()
    assert weight_N.grad is not None
    assert x_ND.grad is None
    assert y_MD.grad is None


def test_integers_and_unused_tensors_pass_through(small_chunks: None) -> None:
    x_ND, y_MD, _ = tensors(7, 5)
    label_N = torch.arange(7)

    def labelled(start: int, x_RD: Tensor, label_R: Tensor, y_MD: Tensor) -> tuple[Tensor]:
        assert label_R.tolist() == list(range(start, start + len(x_RD)))
        return ((x_RD.sum(dim=1) * label_R).sum(),)

    (total,) = sum_over_rows(labelled, [x_ND, label_N], [y_MD])
    total.backward()
    torch.testing.assert_close(x_ND.grad, label_N[:, None].expand(7, 3).double())
    assert y_MD.grad is None or not y_MD.grad.any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_sum_is_the_same(small_chunks: None, mode: type) -> None:
    x_ND, y_MD, weight_N = tensors(7, 5)
    expected, _ = sum_over_rows(term, [x_ND, weight_N], [y_MD])
    with mode():
        total, _ = sum_over_rows(term, [x_ND, weight_N], [y_MD])
    assert not total.requires_grad
    torch.testing.assert_close(total, expected)


def test_a_retained_graph_gives_the_same_gradient_again(small_chunks: None) -> None:
    x_ND, y_MD, weight_N = tensors(7, 5)
    total, _ = sum_over_rows(term, [x_ND, weight_N], [y_MD])
    (first,) = torch.autograd.grad(total, x_ND, retain_graph=True)
    (second,) = torch.autograd.grad(total, x_ND)
    assert torch.equal(first, second)


def test_a_second_derivative_is_refused_rather_than_wrong(small_chunks: None) -> None:
    x_ND, y_MD, weight_N = tensors(7, 5)
    total, _ = sum_over_rows(term, [x_ND, weight_N], [y_MD])
    (gradient,) = torch.autograd.grad(total * total, x_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()

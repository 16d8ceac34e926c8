"""The modulated norm: what autograd makes of its formula, without keeping the normed tokens."""

import pytest
import torch
import torch.nn.functional as F

from model.norms import EPS, modulated_norm


def as_written(x, shift, scale):
    return torch.addcmul(shift, 1 + scale, F.layer_norm(x, x.shape[-1:], eps=EPS))


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_formula(dtype, tokens):
    torch.manual_seed(0)
    x, grad = (torch.randn(2, 7, 24, dtype=dtype) for _ in range(2))
    shift, scale = (torch.randn(2, tokens, 24, dtype=dtype) for _ in range(2))
    found = []
    for norm in (modulated_norm, as_written):
        given = [tensor.detach().requires_grad_() for tensor in (x, shift, scale)]
        y = norm(*given)
        y.backward(grad)
        found.append([y.detach(), *(tensor.grad for tensor in given)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_equal_differences_of_values():
    torch.manual_seed(0)
    given = [torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 8), (1, 8), (1, 8))]
    assert torch.autograd.gradcheck(modulated_norm, given)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, True), (False, False, True)])
def test_only_the_gradients_that_are_wanted_are_made(wanted):
    given = [torch.randn(1, n, 16, requires_grad=w) for n, w in zip((50, 1, 1), wanted, strict=True)]
    modulated_norm(*given).square().sum().backward()
    assert [tensor.grad is not None for tensor in given] == list(wanted)


def test_normed_tokens_are_not_kept():
    x, shift, scale = (torch.randn(1, n, 16, requires_grad=True) for n in (50, 1, 1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        modulated_norm(x, shift, scale)
    assert [t.data_ptr() for t in kept if t.numel() == x.numel()] == [x.data_ptr()]

"""Linear layers whose bias and residual are added as the product is written: the same sums, with fewer roundings."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail import linear
from vitrail.linear import Linear, ResidualLinear, drop_path

BF16_ERROR = 2**-8


@pytest.fixture(autouse=True)
def _nothing_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MIN_VALUES", 1)


def gradients(out: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    """Of a loss that weighs each value of `out` in its own way."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    return list(torch.autograd.grad((out * weights).sum(), of))


def test_a_linear_layer_is_torchs_to_the_bit() -> None:
    torch.manual_seed(0)
    layer = Linear(24, 40).bfloat16()
    x = torch.randn(3, 17, 24, dtype=torch.bfloat16, requires_grad=True)
    given = [x, layer.weight, layer.bias]
    ours, theirs = layer(x), F.linear(*given)
    assert torch.equal(ours, theirs)
    assert type(ours.grad_fn).__name__ != type(theirs.grad_fn).__name__  # ours is another way to it
    for own, other in zip(gradients(ours, given), gradients(theirs, given), strict=True):
        assert own.shape == other.shape
        assert (own - other).norm() < BF16_ERROR * other.norm()


@pytest.mark.parametrize("num_tokens", [17, 1])
def test_a_residual_is_added_before_anything_is_rounded(num_tokens: int) -> None:
    """The class token of `tokens` is no block of memory; the sum must come out right there too."""
    torch.manual_seed(0)
    layer = ResidualLinear(24, 40, 0.0, 0.0).bfloat16()
    x = torch.randn(3, num_tokens, 24, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.randn(3, 17, 40, dtype=torch.bfloat16, requires_grad=True)
    given = [x, tokens, layer.weight, layer.bias]
    out = layer(x, onto=tokens[:, :num_tokens])
    exact_given = [tensor.detach().double().requires_grad_() for tensor in given]
    exact = exact_given[1][:, :num_tokens] + F.linear(exact_given[0], *exact_given[2:])
    assert (out - exact).abs().max() <= BF16_ERROR * exact.abs().max()
    twice_rounded = tokens[:, :num_tokens] + F.linear(x, layer.weight, layer.bias)
    assert (out - exact).norm() < 0.9 * (twice_rounded - exact).norm()
    for own, other in zip(gradients(out, given), gradients(exact, exact_given), strict=True):
        assert own.shape == other.shape
        assert (own - other).norm() < BF16_ERROR * other.norm()


@pytest.mark.parametrize(("learns", "x_learns", "num_products"), [(True, True, 2), (True, False, 1), (False, True, 1)])
def test_gradients_that_nobody_asks_for_are_not_made(learns: bool, x_learns: bool, num_products: int) -> None:
    layer = ResidualLinear(4, 8, 0.0, 0.0).bfloat16().requires_grad_(learns)
    x = torch.randn(1, 2, 4, dtype=torch.bfloat16, requires_grad=x_learns)
    out = layer(x, onto=torch.zeros(1, 2, 8, dtype=torch.bfloat16))
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == num_products * 2 * 2 * 4 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_branches_are_dropped_in_training_and_what_they_end_on_stays(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = ResidualLinear(4, 8, 0.0, 0.5).to(dtype)
    x, onto = torch.randn(64, 3, 4, dtype=dtype), torch.randn(64, 3, 8, dtype=dtype)
    atol = 0.05 if dtype == torch.bfloat16 else 1e-5
    with torch.no_grad():
        whole = layer.eval()(x, onto)
        torch.testing.assert_close(whole, onto + F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=atol)
        out = layer.train()(x, onto)
    is_dropped = (out == onto).flatten(1).all(1)
    assert 16 < is_dropped.sum() < 48
    kept = (onto + 2 * (whole - onto))[~is_dropped]
    torch.testing.assert_close(out[~is_dropped], kept, rtol=1e-5, atol=atol)


def test_drop_path_drops_an_image_as_a_whole() -> None:
    torch.manual_seed(0)
    branch = torch.ones(2000, 3, 4)
    dropped = drop_path(branch, 0.25)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert dropped.flatten(1).std(1).max() == 0
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)


def test_a_compiler_or_an_exporter_meets_torchs_own_operators() -> None:
    layer = ResidualLinear(4, 8, 0.0, 0.0).bfloat16().eval()
    example = (torch.randn(2, 3, 4, dtype=torch.bfloat16), torch.randn(2, 3, 8, dtype=torch.bfloat16))
    operators = {str(node.target) for node in torch.export.export(layer, example).graph.nodes}
    assert any(name.startswith("aten.linear") for name in operators)
    assert not any("mkldnn" in name for name in operators)


def test_small_inputs_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(4, 8).bfloat16(), torch.randn(2, 3, 4, dtype=torch.bfloat16)
    monkeypatch.setattr(linear, "MIN_VALUES", x.numel())
    assert "WrittenOnce" in type(layer(x).grad_fn).__name__
    assert "WrittenOnce" not in type(layer(x[:1]).grad_fn).__name__

"""Several adapters on one model: activation, exact combination, one per row, and what is left when they go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.bindings import TAKEN_NAMES
from rankwise.core.errors import ActivationError, ArgumentError, MergeError
from tests.contract.subjects import scatter


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)).double()


def inputs(rows: int = 4) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def two() -> tuple[nn.Module, rankwise.Handle, rankwise.Handle]:
    net = model()
    first = rankwise.adapt_(net, rankwise.compose("lora(rank=2)"), name="first")
    second = rankwise.adapt_(net, rankwise.compose("rslora(rank=3)"), name="second", seed=1)
    scatter(first, 1)
    scatter(second, 2)
    return net, first, second


def alone(handle: rankwise.Handle, x: Tensor) -> Tensor:
    handle.activate_()
    return handle.model(x)


def test_the_newest_adapter_acts_and_others_can_be_chosen() -> None:
    net, first, second = two()
    x = inputs()
    newest = net(x)
    assert torch.equal(newest, alone(second, x))
    assert not torch.allclose(alone(first, x), newest)
    rankwise.activate_(net, None)
    assert torch.equal(net(x), model()(x))


def test_a_weighted_combination_is_exact_in_the_weights() -> None:
    net, first, second = two()
    rankwise.activate_(net, {"first": 0.5, "second": -2.0})
    expected = net[0].weight + 0.5 * first.update_of("0").dense() - 2 * second.update_of("0").dense()
    torch.testing.assert_close(rankwise.effective_weights(net)["0.weight"], expected)
    mixed = torch.nn.functional.linear(inputs(), expected, net[0].bias)
    torch.testing.assert_close(net[0](inputs()), mixed)


def test_rows_of_a_batch_use_their_own_adapter() -> None:
    net, first, second = two()
    x = inputs(4)
    rankwise.activate_(net, ["second", None, "first", "second"])
    got = net(x)
    rankwise.activate_(net, None)
    expected = [alone(second, x)[0], model()(x)[1], alone(first, x)[2], alone(second, x)[3]]
    torch.testing.assert_close(got, torch.stack(expected))


def test_unknown_names_and_taken_names_are_errors() -> None:
    net, *_ = two()
    with pytest.raises(ActivationError, match=r"no adapter 'third'.*\['first', 'second'\]"):
        rankwise.activate_(net, "third")
    with pytest.raises(ArgumentError, match="'first' is on this model already"):
        rankwise.adapt_(net, rankwise.compose("lora(rank=2)"), name="first")
    for name in ("a.b", "keys", "class", ""):
        with pytest.raises(ArgumentError, match="cannot be an adapter's name"):
            rankwise.adapt_(model(), rankwise.compose("lora(rank=2)"), name=name)


def test_merging_one_of_two_leaves_the_other_acting() -> None:
    net, first, second = two()
    x = inputs()
    rankwise.activate_(net, {"first": 1.0, "second": 1.0})
    both = net(x)
    before = net[0].weight.clone()
    first.merge_()
    torch.testing.assert_close(net(x), both)
    second.merge_()
    torch.testing.assert_close(net(x), both)
    first.unmerge_()
    torch.testing.assert_close(net(x), both)
    second.unmerge_()
    assert torch.equal(net[0].weight, before)
    with pytest.raises(MergeError, match="is not merged"):
        second.unmerge_()


def test_editing_while_merged_does_not_reach_the_base() -> None:
    net, first, _ = two()
    before = net[0].weight.clone()
    first.merge_()
    scatter(first, 7)
    first.unmerge_()
    assert torch.equal(net[0].weight, before)


def test_switched_off_puts_back_what_acted() -> None:
    net, first, _ = two()
    first.activate_()
    expected = net(inputs())
    with rankwise.switched_off(net):
        assert torch.equal(net(inputs()), model()(inputs()))
    assert torch.equal(net(inputs()), expected)


def test_detaching_all_gives_the_model_back() -> None:
    net, first, second = two()
    keys = list(model().state_dict())
    flags = {name: parameter.requires_grad for name, parameter in model().named_parameters()}
    first.detach_()
    second.activate_()
    second.detach_()
    assert list(net.state_dict()) == keys
    assert type(net[0]) is nn.Linear
    assert not net._forward_pre_hooks
    assert torch.equal(net(inputs()), model()(inputs()))
    assert {name: parameter.requires_grad for name, parameter in net.named_parameters()} == flags


def test_a_failed_adapt_leaves_nothing_behind() -> None:
    net = model()
    with pytest.raises(ArgumentError):
        rankwise.adapt_(net, rankwise.compose("lora(rank=2, input_start='nonsense')"))
    assert list(net.state_dict()) == list(model().state_dict())
    assert all(parameter.requires_grad for parameter in net.parameters())
    rankwise.adapt_(net, rankwise.compose("lora(rank=2)"))


def test_base_weight_that_trains_along_gets_its_gradient() -> None:
    """A layer whose weight the user unfreezes is no longer fused, and W.grad is what autograd gives."""
    net = model()
    handle = rankwise.adapt_(net, rankwise.compose("lora(rank=2)"))
    scatter(handle)
    net[0].weight.requires_grad_(True)
    net(inputs()).square().sum().backward()
    effective = {key: value.detach().requires_grad_(True) for key, value in rankwise.effective_weights(net).items()}
    rankwise.functional_call(net, effective, inputs()).square().sum().backward()
    torch.testing.assert_close(net[0].weight.grad, effective["0.weight"].grad)


def test_a_layer_used_twice_gathers_gradient_from_both_uses() -> None:
    layer = nn.Linear(6, 6).double()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    net = Twice()
    handle = rankwise.adapt_(net, rankwise.compose("lora(rank=2)"))
    scatter(handle)
    entry = handle.parameterization("layer")
    net(inputs()).square().sum().backward()
    mine = entry.roles()["B"].grad.clone()
    net.zero_grad()
    rankwise.functional_call(net, rankwise.effective_weights(net), inputs()).square().sum().backward()
    torch.testing.assert_close(entry.roles()["B"].grad, mine)


def test_hooks_on_an_adapted_layer_fire_once_with_the_adapted_output() -> None:
    net, first, _ = two()
    seen: list[Tensor] = []
    net[0].register_forward_hook(lambda module, arguments, output: seen.append(output))
    first.activate_()
    net(inputs())
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], net[0](inputs()))


def test_multihead_attention_is_refused_on_the_path_and_works_on_the_weight() -> None:
    from rankwise.core.errors import TargetError

    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(TargetError, match="binding='weight'"):
        rankwise.adapt_(attention, rankwise.compose("lora(rank=2)"), where=["out_proj"])
    before = attention(x, x, x)[0]
    handle = rankwise.adapt_(attention, rankwise.compose("lora(rank=2)"), where=["out_proj"], binding="weight")
    torch.testing.assert_close(attention(x, x, x)[0], before)
    scatter(handle)
    changed = attention(x, x, x)[0]
    assert not torch.allclose(changed, before)
    handle.merge_()
    torch.testing.assert_close(attention(x, x, x)[0], changed)
    handle.detach_()
    assert torch.equal(attention(x, x, x)[0], before)


def test_coverage_says_what_was_left_out_and_why() -> None:
    net = nn.ModuleDict({"body": nn.Linear(6, 8), "convolution": nn.Conv1d(2, 3, 1), "lm_head": nn.Linear(8, 5)})
    handle = rankwise.adapt_(net, rankwise.compose("lora(rank=2)"))
    said = handle.coverage()
    assert "adapted      body  Linear 8×6" in said
    assert "lm_head  output head" in said
    assert "convolution  Conv1d, not in where='all-linear'" in said
    assert "on 1 layers" in repr(handle) and "2 layers left out" in repr(handle)


def test_modules_trained_whole_are_trained_saved_and_loaded(tmp_path) -> None:
    net = model()
    handle = rankwise.adapt_(net, rankwise.compose("lora(rank=2)"), where=["0"], train_also=["1"])
    assert net[1].weight.requires_grad and not net[0].weight.requires_grad
    optimizer = handle.optimizer(lr=0.1)
    net(inputs()).square().sum().backward()
    handle.after_backward()
    optimizer.step()
    handle.after_step()
    assert not torch.equal(net[1].weight, model()[1].weight)
    handle.save(tmp_path)
    other = model()
    rankwise.load_(other, tmp_path)
    assert torch.equal(other(inputs()), net(inputs()))
    assert other[1].weight.requires_grad


def test_names_that_would_hide_an_attribute_are_refused_before_anything_is_changed() -> None:
    net = model()
    handle = rankwise.adapt_(net, rankwise.catalog.lora(rank=2))
    here = vars(next(iter(handle.adapters(site) for site in handle.targets)))
    own = {name for name in here if not name.startswith("_") and name != "training"}
    assert own == TAKEN_NAMES
    for name in [*own, "merge site", "forward", "keys", "operator", "import"]:
        with pytest.raises(ArgumentError, match="cannot be an adapter's name"):
            rankwise.adapt_(net, rankwise.catalog.lora(rank=2), name=name)
    assert all(list(handle.adapters(site)) == ["default"] for site in handle.targets)


def test_a_second_adapter_in_the_weight_binding_changes_the_bias_too() -> None:
    """The first one leaves the bias alone, so nothing was registered for it."""
    outputs = []
    for binding in ("path", "weight"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 4)).double()
            x = torch.randn(5, 6, dtype=torch.float64)
        rankwise.adapt_(model, rankwise.catalog.lora(rank=2), name="first", binding=binding)
        handle = rankwise.adapt_(model, rankwise.catalog.ia3(), name="second", binding=binding)
        with torch.no_grad():
            handle.blocks()["0"]["gain"].copy_(torch.arange(4) / 2.0)
        outputs.append(model(x))
    torch.testing.assert_close(outputs[0], outputs[1])

"""`overlap=True`: the gradients, the collectives and the hooks of the plain path, and an all-reduce that runs meanwhile."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shardwise
from blocks import ATTENTION_PLAN, Attention, GatedMlp, Mlp, fails, randomize, under, x
from overlapped import GATED_PLAN, MLP_PLAN, both_ways, equal, given, same, train
from shardwise.layers import overlap
from shardwise.layers.overlap import OverlappedLinear

# --- gradients ---


@pytest.mark.parametrize("accumulated", [1, 2, 3])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gradients_of_attention(threads, size, kv_heads, accumulated):
    """Guards: a weight gradient lost, counted twice with the next micro-batch, or computed from a sibling's; a sum over ranks
    left out of KV heads that ranks share (four ranks, two heads).
    """
    module = randomize(nn.Sequential(Attention(kv_heads=kv_heads)))
    data = [x(2, 5, 12) for _ in range(accumulated)]
    same(threads, size, module, under("0", ATTENTION_PLAN), partial(_train, data))


def _train(data: list[Tensor], model: nn.Module) -> dict[str, Tensor]:
    return train(model, *data)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 0, 6), (2, 3, 6), (2, 2, 3, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradients_of_layers(threads, kind, bias, shape):
    """Guards: the gradient of a transposed weight (GPT-2) left untransposed; a missing bias; inputs of other dims."""
    module = randomize(nn.Sequential(Mlp(kind=kind, bias=bias)))
    same(threads, 2, module, under("0", MLP_PLAN), partial(_train, [x(*shape)]))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradients_of_fused_layers(threads, kind):
    """Guards: styles that inherit from the column-wise one left out."""
    module = randomize(nn.Sequential(GatedMlp(kind=kind)))
    same(threads, 2, module, under("0", GATED_PLAN), partial(_train, [x(2, 3, 6)]))


def test_gathered_outputs(threads):
    """Guards: a layer without a region (a language model's head), whose copy nobody lets go of."""
    module, data = randomize(nn.Sequential(nn.Linear(6, 7))), (x(2, 6), x(2, 6))

    def use(model: nn.Module) -> object:
        found = train(model, *data)
        region = model[0]._tp.region
        assert region is None or (region._last is None and not region._late)
        return found

    same(threads, 2, module, {"0": "colwise_gather_output"}, use)


def test_a_wrong_gradient_would_be_seen(threads, monkeypatch):
    """Guards the tests above: with a weight gradient left out they fail."""
    module = randomize(nn.Sequential(Attention()))
    monkeypatch.setattr(overlap.WeightGradient, "backward", staticmethod(lambda ctx, token: (None,) * 4))
    fails(lambda: same(threads, 2, module, under("0", ATTENTION_PLAN), partial(_train, [x(2, 5, 12)])))


class Wide(nn.Module):
    """Two inputs, siblings that are called never, twice, or for nothing, and one with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 4) for _ in range(4))
        self.never, self.own = nn.Linear(6, 4), Own(6, 4)
        self.down = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        """(..., 6) -> the same."""
        y = x.cos()
        self.d(x)
        return self.down(self.a(x) * self.b(y) + self.a(y) + self.c(x) * self.c(x) + self.own(x))


class Own(nn.Linear):
    """A product that is more than torch's."""

    def forward(self, input: Tensor) -> Tensor:
        """As a linear layer, scaled."""
        return 3 * super().forward(input)


WIDE_PLAN = dict.fromkeys(("a", "b", "c", "d", "never", "own"), "colwise") | {"down": "rowwise"}


def test_siblings_called_never_twice_or_for_nothing(threads):
    """Guards: a gradient of zero, where the plain path leaves None, for what was not called or not used; one of two products
    of the same layer lost; a layer's own forward passed by.
    """
    module = randomize(nn.Sequential(Wide()))
    plain, overlapped = threads(both_ways, 2, module, under("0", WIDE_PLAN), partial(_train, [x(2, 6), x(2, 6)]))[0]
    assert not plain.keys() & {"0.d.weight", "0.d.bias", "0.never.weight", "0.never.bias"}
    torch.testing.assert_close(overlapped, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [("q_proj.weight",), ("q_proj.weight", "k_proj.bias"), ("weight",), ("weight", "bias")])
def test_frozen_parameters(threads, frozen):
    """Guards: a gradient for what is frozen, and none for the bias beside it; a node for what has no gradient at all."""
    module = randomize(nn.Sequential(Attention()))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    same(threads, 2, module, under("0", ATTENTION_PLAN), partial(_train, [x(2, 5, 12)]))


def test_an_input_without_gradient(threads):
    """Guards: a first layer behind frozen embeddings, which has weight gradients and no all-reduce."""
    module, data = randomize(nn.Sequential(Mlp())), x(2, 6)

    def use(model: nn.Module) -> object:
        model(data).sum().backward()
        return given(model)

    same(threads, 2, module, under("0", MLP_PLAN), use)


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank addition for this rank's outputs."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down, self.up = nn.Linear(12, 2, bias=False).double(), nn.Linear(2, len(base.weight), bias=False).double()
        for weight in (self.down.weight, self.up.weight):  # ranks that are threads draw from one random stream
            nn.init.constant_(weight, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """As the base layer, and a bit more."""
        return self.base_layer(x) + self.up(self.down(x))


def test_an_adapter_around_a_layer(threads):
    """Guards: a wrapped layer that is no longer found among its siblings, and a gradient for its frozen weight."""
    module, data = randomize(nn.Sequential(Attention())), x(2, 5, 12)

    def use(model: nn.Module) -> object:
        model[0].q_proj = Adapted(model[0].q_proj)
        return train(model, data)

    same(threads, 2, module, under("0", ATTENTION_PLAN), use)


def test_no_gradient_no_node(threads):
    """Guards: something kept, or computed otherwise, where nothing is trained."""
    module, data = randomize(nn.Sequential(Attention())), x(2, 5, 12)

    def use(model: nn.Module) -> object:
        with torch.no_grad():
            output = model(data.requires_grad_())
        with torch.inference_mode():
            assert torch.equal(model(data), output)
        region = model[0].q_proj._tp.region
        assert output.grad_fn is None
        assert region._last is None
        assert not getattr(region, "_late", None)
        return output

    same(threads, 2, module, under("0", ATTENTION_PLAN), use)


# --- what else runs backward ---


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(threads, use_reentrant):
    """Guards: tensors saved otherwise when recomputed; a wait that never comes in the inner backward."""
    module, data = randomize(nn.Sequential(Attention())), [x(2, 5, 12), x(2, 5, 12)]

    def use(model: nn.Module) -> object:
        return train(model, *data, call=lambda t: checkpoint(model, t, use_reentrant=use_reentrant))

    same(threads, 2, module, under("0", ATTENTION_PLAN), use)
    found = threads(both_ways, 2, module, under("0", ATTENTION_PLAN), use)[0][1]
    equal(found, threads(both_ways, 2, module, under("0", ATTENTION_PLAN), partial(_train, data))[0][1])


def test_double_backward(threads):
    """Guards: a gradient of a gradient that lacks what goes through a weight, or through the sum over ranks."""
    module, data = randomize(nn.Sequential(Attention(), Attention())), x(2, 5, 12)
    plan = under("0", ATTENTION_PLAN) | under("1", ATTENTION_PLAN)

    def use(model: nn.Module) -> object:
        leaf = data.clone().requires_grad_()
        wanted = [leaf, *model.parameters()]
        first = torch.autograd.grad(model(leaf).sin().sum(), wanted, create_graph=True)
        sum(grad.pow(2).sum() for grad in first).backward()
        return [grad.detach() for grad in first], given(model, leaf)

    for plain, overlapped in threads(both_ways, 2, module, plan, use):
        torch.testing.assert_close(overlapped, plain, rtol=1e-10, atol=1e-10)


def test_a_graph_used_twice(threads):
    """Guards: what the first backward left over, added to the second."""
    module, data = randomize(nn.Sequential(Attention())), x(2, 5, 12)

    def use(model: nn.Module) -> object:
        leaf = data.clone().requires_grad_()
        loss = model(leaf * 1).sin().sum()
        alone = torch.autograd.grad(loss, leaf, retain_graph=True)
        weight = torch.autograd.grad(loss, model[0].k_proj.weight, retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        return alone, weight, given(model, leaf)

    same(threads, 2, module, under("0", ATTENTION_PLAN), use)


def test_a_backward_that_failed(threads):
    """Guards: what a backward left that broke off, added to the next one."""
    module, data = randomize(nn.Sequential(Attention())), x(2, 5, 12)

    def use(model: nn.Module) -> object:
        leaf = data.clone().requires_grad_()
        loss = model(leaf * 1).sin().sum()
        handle = model[0].v_proj.weight.register_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            loss.backward(retain_graph=True)
        handle.remove()
        model.zero_grad()
        leaf.grad = None
        loss.backward()
        return given(model, leaf)

    same(threads, 2, module, under("0", ATTENTION_PLAN), use)


def _fail(grad: Tensor) -> Tensor:
    raise ZeroDivisionError


def test_hooks(threads):
    """Guards: a module's or a parameter's hook that is not called, or with other values."""
    module, data = randomize(nn.Sequential(Attention())), x(2, 5, 12)

    def use(model: nn.Module) -> object:
        seen: list[Tensor] = []
        layer = model[0].k_proj
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        layer.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
        model[0].q_proj.register_full_backward_hook(lambda module, of_input, of_output: seen.append(of_input[0]))
        layer.weight.register_hook(lambda grad: seen.append(grad) or grad * 2)
        layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        return seen, train(model, data)

    # Around the threads, which would each restore what the other one set.
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly(check_nan=True):
        same(threads, 2, module, under("0", ATTENTION_PLAN), use)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast(threads, dtype):
    """Guards: a product in the weight's dtype, or a gradient in that of the product."""
    module, data = randomize(nn.Sequential(Attention())).to(dtype), x(2, 5, 12).to(dtype)

    def use(model: nn.Module) -> object:
        return train(model, data, call=torch.autocast("cpu", torch.bfloat16)(model))

    same(threads, 2, module, under("0", ATTENTION_PLAN), use)


def test_autocast_and_a_weight_that_is_read_again(threads):
    """Guards: a cast weight without a gradient, left in the cache of torch's older autocasts for the next who reads it. The
    plain path adds what the two give in bfloat16, so they differ by its noise; more than half of the gradient would be lost.
    """
    module, data = randomize(nn.Sequential(Mlp())).float(), x(4, 6).float()

    def use(model: nn.Module) -> object:
        leaf = data.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(leaf * 1).sum() + nn.functional.linear(leaf * 3, model[0].up.weight).sum()
        loss.backward()
        return given(model, leaf)

    for plain, overlapped in threads(both_ways, 2, module, under("0", MLP_PLAN), use):
        torch.testing.assert_close(overlapped, plain, rtol=0.05, atol=0.05)


def test_copies_and_pickles(threads):
    """Guards: a copy whose layers look for the original's siblings, or that overlaps no more."""
    module, data = randomize(nn.Sequential(Attention())), x(2, 5, 12)

    def use(model: nn.Module) -> object:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        found = []
        for other in (copy.deepcopy(model), torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)):
            late = [member() for member in getattr(other[0].q_proj._tp.region, "_members", [])]
            overlaps = isinstance(model[0].q_proj, OverlappedLinear)
            assert late == ([other[0].q_proj, other[0].k_proj, other[0].v_proj] if overlaps else [])
            found.append(train(other, data))
        return found, train(copy.deepcopy(model[0].q_proj), data), train(model, data)

    same(threads, 2, module, under("0", ATTENTION_PLAN), use)


def test_a_model_is_freed_at_once(threads):
    """Guards: a cycle between a layer and its siblings, which keeps the memory of a model until Python looks for cycles."""
    module, data = nn.Sequential(Attention()), torch.ones(1, 2, 12)

    def use(model: nn.Module) -> object:
        parts = [weakref.ref(part) for part in model.modules() if isinstance(part, OverlappedLinear)]
        train(model, data)
        gc.disable()
        model._modules.clear()
        try:
            return [part() is None for part in parts]
        finally:
            gc.enable()

    for _, freed in threads(both_ways, 2, module, under("0", ATTENTION_PLAN), use):
        assert freed == [True] * 3


def test_the_way_back(threads):
    """Guards: a class, or a region, that stays."""

    def use(model: nn.Module) -> object:
        shardwise.unparallelize(model)
        assert type(model[0].q_proj) is nn.Linear
        assert "_tp" not in vars(model[0].q_proj)
        return train(model, data)

    module, data = randomize(nn.Sequential(Attention())), x(2, 5, 12)
    same(threads, 2, module, under("0", ATTENTION_PLAN), use)

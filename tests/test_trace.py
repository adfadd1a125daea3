"""Capture: the same function, the same names, and for what cannot be captured the line that stands in the way."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from fxquant.errors import TraceError
from fxquant.trace import OPAQUE, trace
from tests.models import TinyMobile, TinyResidual, settle


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # the branch in question
            return x
        return -x


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.ReLU(), Branch())

    def forward(self, x):
        return self.block(self.conv(x)).mean((2, 3))


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16)


def test_a_submodule_that_branches_on_values_stays_one_call_and_its_line_is_named():
    traced = trace(Branching(), (images(),))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["conv", "block.0", "block.1"]
    assert isinstance(traced.get_submodule("block.1"), Branch)
    assert list(traced.meta[OPAQUE]) == ["block.1"]
    message = traced.meta[OPAQUE]["block.1"]
    line = Branch.forward.__code__.co_firstlineno + 1
    assert message.startswith("submodule 'block.1' of Branching cannot be captured as a graph")
    assert f"at {__file__}:{line}: if x.sum() > 0:" in message
    assert "depends on a tensor's values" in message


def test_a_branch_in_the_model_itself_needs_no_submodule():
    with pytest.raises(TraceError, match=r"^Branch cannot be captured as a graph, at .*test_trace\.py:\d+: if x\.sum"):
        trace(Branch(), (images(),))


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_a_model_that_returns_no_tensor_is_refused(kind):
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return {"a": y} if kind is dict else kind((y, y))

    with pytest.raises(TraceError, match=rf"the model returns a {kind.__name__}; .* Wrap it in a module that returns"):
        trace(Several(), (images(),))


def test_a_model_whose_result_changes_from_call_to_call_is_refused():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    with pytest.raises(TraceError, match=r"captured graph differs from the model by up to .* does what a graph does"):
        trace(Counting(), (images(),))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model", [TinyResidual, TinyMobile])
def test_the_graph_computes_the_same_with_the_same_names(model, training):
    x = images()
    original = settle(model(), x).train(training)
    state = {k: v.clone() for k, v in original.state_dict().items()}
    traced = trace(original, (x,))
    assert traced.training is training
    assert original.training is training
    assert list(traced.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in original.state_dict().items())
    other = images(2)  # another batch size
    with torch.no_grad():
        assert torch.equal(traced.eval()(other), original.eval()(other))


def test_batch_norm_and_dropout_follow_the_mode_after_capture():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.bn(x))

    x = images()
    traced = trace(Dropping(), (x,))
    before = traced.bn.running_mean.clone()
    assert torch.equal(traced.eval()(x), traced(x))
    assert torch.equal(traced.bn.running_mean, before)
    assert (traced.train()(x) == 0).float().mean() > 0.4
    assert not torch.equal(traced.bn.running_mean, before)


def test_identities_and_inplace_operators_are_gone():
    x = images()
    original = TinyResidual()
    traced = trace(settle(original, x), (x,))
    targets = [node.target for node in traced.graph.nodes]
    assert "drop" not in targets
    assert operator.iadd not in targets
    assert operator.add in targets
    assert not any(m.inplace for m in traced.modules() if isinstance(m, nn.ReLU))
    assert original.relu.inplace


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_only_a_dropout_that_does_nothing_is_dropped(p):
    traced = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(p)), (images(),))
    assert any(node.target == "1" for node in traced.graph.nodes) is (p > 0)


def test_an_inplace_function_does_not_overwrite_what_a_quantizer_needs():
    class Inplace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return y + F.relu(y, inplace=True)

    x = images()
    model = Inplace()
    with torch.no_grad():
        assert torch.equal(trace(model, (x,))(x), model(x))


def test_a_forward_that_tells_one_image_from_several_is_refused():
    class Squeezes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            y = self.conv(x).mean((2, 3), keepdim=True).squeeze()
            return self.head(y[None] if x.shape[0] == 1 else y)

    with pytest.raises(TraceError, match=r"on a batch of 1: .* a comparison of the batch size"):
        trace(Squeezes(), (images(),))


def test_a_model_that_takes_no_single_image_itself_is_captured():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            if int(x.shape[0]) == 1:
                raise ValueError("give several")
            return self.conv(x)

    assert trace(Several(), (images(),)).conv is not None


@pytest.mark.parametrize(
    "asks", [lambda x: x.view(len(x), -1), lambda x: torch.stack([image.flatten() for image in x])]
)
def test_the_number_of_images_as_a_plain_number_is_refused_with_what_to_write(asks):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return asks(self.conv(x))

    with pytest.raises(TraceError, match=r"the number of images is asked for .* write x\.shape\[0\] for len\(x\)"):
        trace(Model(), (images(),))


@pytest.mark.parametrize("keeps", ["a feature", "pruned weights", "normed weights"])
def test_a_model_that_keeps_what_a_gradient_goes_through_is_copied(keeps):
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            self.features = [self.conv(x)]
            return self.head(self.features[0].mean((2, 3)))

    model, x = Keeping(), images()
    if keeps == "pruned weights":
        prune.l1_unstructured(model.head, "weight", 0.5)
    if keeps == "normed weights":
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(model.head)
    model(x)
    assert torch.allclose(trace(model, (x,)).eval()(x), model(x), atol=1e-6)
    assert model.features[0].requires_grad

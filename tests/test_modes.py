"""What a model does in training alone: dropout goes on in the graph, all else that is off there is named."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from fxquant.trace import TRAINS_OTHERWISE, trace
from tests.models import TinyMobile, TinyResidual


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 9, 10)


class Does(nn.Module):
    """A convolution, and what a function makes of its output and of ``training``."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3), function

    def forward(self, x):
        return self.function(self.conv(x), self.training)


@pytest.mark.parametrize(
    ("function", "module"),
    [
        (lambda x, t: F.dropout(x, 0.3, t), nn.Dropout),
        (lambda x, t: F.dropout(x, p=0.3, training=t), nn.Dropout),
        (lambda x, t: F.dropout(x, 0.3, t, True) * 1, nn.Dropout),
        (lambda x, t: F.dropout(x, 0.3, t, inplace=True), nn.Dropout),
        (lambda x, t: F.dropout(x, 0.3 if t else 0.0), nn.Dropout),
        (lambda x, t: F.dropout1d(x[0], 0.3, training=t), nn.Dropout1d),
        (lambda x, t: F.dropout2d(x, 0.3, training=t), nn.Dropout2d),
        (lambda x, t: F.dropout3d(x[:, :, None], 0.3, training=t), nn.Dropout3d),
        (lambda x, t: F.alpha_dropout(x, 0.3, training=t), nn.AlphaDropout),
        (lambda x, t: F.feature_alpha_dropout(x, 0.3, training=t), nn.FeatureAlphaDropout),
    ],
)
def test_dropout_as_a_function_goes_on_dropping_in_training(function, module):
    model = Does(function)
    traced = trace(model, (images(),))
    (drop,) = (m for m in traced.modules() if type(m) is module)
    assert drop.p == 0.3
    assert traced.meta[TRAINS_OTHERWISE] == []
    x = images(64)
    with torch.no_grad():
        assert torch.equal(traced.eval()(x), model.eval()(x))
        assert not torch.equal(traced.train()(x), traced(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, t: F.dropout(x, 0.3, training=False),
        lambda x, t: F.dropout(x, 0.0, training=t),
        lambda x, t: F.alpha_dropout(x, 0.3),
    ],
)
def test_dropout_that_never_drops_is_gone(function):
    model, x = Does(function), images()
    traced = trace(model, (x,)).train()
    assert [node.target for node in traced.graph.nodes if node.op.startswith("call")] == ["conv"]
    assert torch.equal(traced(x), model.train()(x))


def noise(x, training):
    return x + torch.randn_like(x) if training else x


def second_head(x, training):
    return (x, x.mean()) if training else x


def decided_by_values(x, training):
    return x * 2 if training and x.mean() > 0 else x


class Falls(nn.Module):
    """Dropout that goes on, whatever else there is."""

    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class NormalisesByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.variance, training=self.training)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (lambda: Does(noise), [""]),
        (lambda: nn.Sequential(nn.Identity(), Does(noise), nn.Conv2d(4, 3, 1), Does(noise)), ["1", "3"]),
        (lambda: Does(lambda x, t: F.dropout(noise(x, t), 0.5, t)), [""]),
        (lambda: Does(second_head), [""]),
        (lambda: nn.Sequential(Does(decided_by_values)), ["0"]),
        (lambda: nn.Sequential(Does(decided_by_values), nn.Conv2d(4, 3, 1), Does(noise), Falls()), ["0", "2"]),
        (lambda: Does(lambda x, t: F.rrelu(x, training=t)), [""]),
        (lambda: nn.Sequential(NormalisesByHand(), nn.Conv2d(3, 4, 3)), ["0"]),
        (lambda: nn.Sequential(timm.layers.DropPath(0.1), nn.Dropout(0.2)), ["0"]),
        (lambda: nn.Sequential(timm.layers.DropPath(0.0), nn.Dropout(0.2)), []),
        (lambda: nn.Sequential(torchvision.ops.StochasticDepth(0.5, "row"), nn.Conv2d(3, 4, 3)), ["0"]),
        (TinyResidual, []),
        (TinyMobile, []),
        (lambda: timm.create_model("test_efficientnet", drop_rate=0.5), []),
    ],
)
def test_what_training_alone_does_is_named(model, names):
    model = model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    traced = trace(model, (torch.randn(2, 3, 32, 32),))
    assert traced.meta[TRAINS_OTHERWISE] == names
    if any(isinstance(module, Falls) for module in model.modules()):
        assert any(isinstance(module, nn.Dropout) for module in traced.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

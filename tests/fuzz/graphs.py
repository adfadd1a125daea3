"""Small models made at random of what vision models are made of, and rules for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant as fq
from fxquant.estimators import ESTIMATORS

CLASSES = 5

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.ReLU6, lambda: nn.ReLU(inplace=True), nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.LeakyReLU,
    lambda: nn.Hardtanh(0, 6), nn.Tanh, nn.Identity, lambda: nn.Dropout(0.2), lambda: nn.PReLU(),
]  # fmt: skip
NORMS: list[Callable[[int], nn.Module]] = [
    *4 * [nn.BatchNorm2d], lambda c: nn.BatchNorm2d(c, affine=False), lambda c: nn.BatchNorm2d(c, momentum=None),
    lambda c: nn.BatchNorm2d(c, track_running_stats=False), lambda c: nn.GroupNorm(1, c), nn.InstanceNorm2d,
]  # fmt: skip
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "double": lambda x: x + x,
    "square": lambda x: x * x,
    "halve": lambda x: x * 0.5,
    "shift": lambda x: x + 0.25,
    "negate": lambda x: -x,
    "flip": lambda x: x.flip(-1),
    "transpose": lambda x: x.transpose(2, 3),
    "reshape": lambda x: x.reshape(x.shape[0], x.shape[1], x.shape[3], x.shape[2]),
    "shuffle": lambda x: x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) if x.shape[1] % 2 == 0 else x,
    "gate": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "crop": lambda x: x[:, :, : max(x.shape[2] - 1, 1)],
    "half of the channels": lambda x: x[:, : max(x.shape[1] // 2, 1)],
    "last chunk": lambda x: x.chunk(2, 1)[-1],
    "parts swapped": lambda x: torch.cat(list(reversed(x.chunk(2, 1))), 1),
    "pad": lambda x: F.pad(x, [1, 0, 0, 1]),
    "even pad": lambda x: F.pad(x, [1, 1, 1, 1]),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0) if x.shape[2] < 8 else x,
    "average": lambda x: F.avg_pool2d(x, 2) if min(x.shape[2:]) > 1 else x,
    "maximum": lambda x: F.max_pool2d(x, 3, 1, 1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (2, 2)),
    "softmax": lambda x: x.softmax(1),
    "clamp": lambda x: x.clamp(-1, 2),
}


class Net(nn.Module):
    """Steps over a growing list of values, each a 4-D tensor; the last one is pooled and classified.

    A step is (kind, name, indices of the values it reads): a module by name, a function by name, or a combination.
    """

    def __init__(self, steps: list[tuple[str, str, tuple[int, ...]]], modules: dict[str, nn.Module], flat: bool):
        super().__init__()
        self.steps, self.flat = steps, flat
        self.body = nn.ModuleDict(modules)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(self.apply_step(step, values))
        x = values[-1]
        x = x.flatten(1) if self.flat else x.mean((2, 3))
        return self.body["head"](x)

    def keep_what_is_read(self) -> None:
        """Drop steps that do not reach the output, and modules that no step calls."""
        read, kept = {len(self.steps)}, []
        for index in range(len(self.steps), 0, -1):
            if index in read:
                kept.insert(0, index)
                read.update(self.steps[index - 1][2])
        place = {0: 0, **{index: position for position, index in enumerate(kept, 1)}}
        self.steps = [
            (kind, name, tuple(place[i] for i in operands))
            for kind, name, operands in (self.steps[i - 1] for i in kept)
        ]
        for name in set(self.body) - {name for _, name, _ in self.steps}:
            del self.body[name]

    def apply_step(self, step: tuple[str, str, tuple[int, ...]], values: list[Tensor]) -> Tensor:
        kind, name, read = step
        operands = [values[i] for i in read]
        if kind == "function":
            return FUNCTIONS[name](*operands)
        if kind == "combine":
            return {"add": lambda: operands[0] + operands[1], "mul": lambda: torch.mul(*operands),
                    "cat": lambda: torch.cat(operands, 1), "sub": lambda: operands[0] - operands[1],
                    "iadd": lambda: (operands[0] * 1).add_(operands[1])}[name]()  # fmt: skip
        module = self.body[name]
        if kind == "tokens":  # a linear layer over channels
            return module(operands[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return module(*operands)


def convolution(draw, channels: int, size: tuple[int, int]) -> nn.Module:
    """A convolution that fits, with or without BatchNorm and activation after it."""
    kernel = tuple(draw(st.integers(1, min(3, s + 2))) for s in size)
    padding = tuple(draw(st.integers(0, 1 if k < 3 else 2)) for k in kernel)
    padding = tuple(max(p, -(-(k - s) // 2)) for p, k, s in zip(padding, kernel, size, strict=True))
    dilation = draw(st.sampled_from([1, 1, 1, 2]))
    if any(s + 2 * p < (k - 1) * dilation + 1 for s, p, k in zip(size, padding, kernel, strict=True)):
        dilation = 1
    groups = draw(st.sampled_from([g for g in (1, 1, 2, channels) if channels % g == 0]))
    out = groups * draw(st.integers(1, max(1, 8 // groups)))
    stride = draw(st.sampled_from([1, 1, 2, (1, 2)]))
    bias = draw(st.booleans())
    layers: list[nn.Module] = [nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias)]
    if draw(st.booleans()):
        layers.append(draw(st.sampled_from(NORMS))(out))
    if draw(st.booleans()):
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


KINDS = [*3 * ["new"], "again", "act", *2 * ["function"], *2 * ["combine"], "tokens"]


@st.composite
def nets(draw, most: int = 7) -> tuple[Net, Tensor]:
    """A model in eval mode with varied BatchNorm statistics, and a batch of images for it."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    channels, height, width = draw(st.integers(1, 4)), draw(st.integers(3, 9)), draw(st.integers(3, 9))
    images = torch.randn(4, channels, height, width)
    net = Net([], {}, draw(st.booleans()))
    values = [images]
    with torch.no_grad():
        for index in range(draw(st.integers(1, most))):
            here = draw(st.integers(max(0, len(values) - 3), len(values) - 1))
            x = values[here]
            kind = draw(st.sampled_from(KINDS))
            alike = [i for i, v in enumerate(values) if v.shape == x.shape]
            same_size = [i for i, v in enumerate(values) if v.shape[2:] == x.shape[2:]]
            if kind == "again":
                fits = [n for n, m in net.body.items() if _takes(m, x)]
                step = ("module", draw(st.sampled_from(fits)), (here,)) if fits else None
            elif kind == "act":
                net.body[f"act{index}"] = draw(st.sampled_from(ACTIVATIONS))()
                step = ("module", f"act{index}", (here,))
            elif kind == "function":
                step = ("function", draw(st.sampled_from(sorted(FUNCTIONS))), (here,))
            elif kind == "combine":
                name = draw(st.sampled_from(["add", "add", "add", "mul", "cat", "sub", "iadd"]))
                step = ("combine", name, (here, draw(st.sampled_from(same_size if name == "cat" else alike))))
            elif kind == "tokens":
                net.body[f"tokens{index}"] = nn.Linear(x.shape[1], draw(st.integers(1, 8)), draw(st.booleans()))
                step = ("tokens", f"tokens{index}", (here,))
            else:
                step = None
            if step is None:
                net.body[f"conv{index}"] = convolution(draw, x.shape[1], tuple(x.shape[2:]))
                step = ("module", f"conv{index}", (here,))
            out = net.apply_step(step, [v.clone() for v in values])
            if out[0].numel() <= 4096:
                net.steps.append(step)
                values.append(out)
        net.keep_what_is_read()
        last = values[-1].flatten(1) if net.flat else values[-1].mean((2, 3))
        net.body["head"] = nn.Linear(last.shape[1], CLASSES, draw(st.booleans()))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 2)
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(-1.5, 1.5)
                module.bias.normal_(0, 0.3)
    return net.eval(), images


def _takes(module: nn.Module, x: Tensor) -> bool:
    """Whether a convolution, alone or the first of a sequence, takes a tensor."""
    conv = module[0] if isinstance(module, nn.Sequential) else module
    if not isinstance(conv, nn.Conv2d) or conv.in_channels != x.shape[1]:
        return False
    geometry = zip(x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, strict=True)
    return all(s + 2 * p >= d * (k - 1) + 1 for s, p, d, k in geometry)


@st.composite
def rules(draw, net: Net) -> list[fq.Rule]:
    """A rule for each layer: widths, estimator, granularity; some layers stay float."""
    found = []
    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if name != "body.head" and draw(st.integers(0, 9)) == 0:
                found.append((name, None, None))
                continue
            estimator = draw(st.sampled_from(sorted(ESTIMATORS)))
            learned = ESTIMATORS[estimator].can_learn_width and draw(st.booleans())
            bits = [(1, 8) if learned and draw(st.booleans()) else draw(st.integers(1, 8)) for _ in range(2)]
            init = draw(st.sampled_from(["mse", "minmax", "percentile"]))
            found.append((name, *bits, estimator, draw(st.integers(0, 3)) > 0, init))
    return [fq.Rule(*rule) for rule in found]

"""ResNet-20: its structure and names, what prepare makes of it, and the shared checkpoint."""

import timm
import torch
from torch import fx
from torch.nn import functional as F

import fxquant as fq
from fxquant import cost
from fxquant.pixels import read_cifar10
from fxquant.timm import create_model, list_models, resolve_model_data_config

from .conftest import needs_shared

RULES = [
    fq.Rule("first|last", weight_bits=8, activation_bits=8),
    fq.Rule("*", weight_bits=4, activation_bits=4),
]


def expected_names():
    convolutions = ["conv1"] + [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (0, 1, 2) for c in (1, 2)]
    norms = [name.replace("conv", "bn") for name in convolutions]
    per_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {f"{name}.weight" for name in convolutions} | {f"{name}.{key}" for name in norms for key in per_norm}
    return names | {"linear.weight", "linear.bias"}


def test_timm_makes_it_by_its_name():
    assert "resnet20" in list_models()
    model = timm.create_model("resnet20", num_classes=7)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    config = resolve_model_data_config(create_model("resnet20"))
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["std"] == (0.229, 0.224, 0.225)


def test_names_and_sizes():
    model = create_model("resnet20")
    assert set(model.state_dict()) == expected_names()
    assert sum(p.numel() for p in model.parameters()) == 269_722
    shapes = {}
    for stage in (1, 2, 3):
        getattr(model, f"layer{stage}").register_forward_hook(lambda m, i, out, s=stage: shapes.update({s: out.shape}))
    model(torch.randn(1, 3, 32, 32))
    assert shapes == {1: (1, 16, 32, 32), 2: (1, 32, 16, 16), 3: (1, 64, 8, 8)}


def test_shortcuts_take_every_other_pixel_and_new_channels_are_zero():
    block = create_model("resnet20").layer2[0].eval()
    torch.nn.init.zeros_(block.conv2.weight)  # what is left is the shortcut
    x = torch.rand(2, 16, 8, 8)
    expected = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
    assert torch.equal(block(x), expected)


def test_prepare_quantizes_all_twenty_layers_and_every_sum():
    model = fq.prepare(
        create_model("resnet20"), RULES, example_inputs=(torch.randn(2, 3, 32, 32),), backend="onnxruntime"
    )
    layers = cost.qat_layers(model)
    assert len(layers) == 20
    named = dict(model.named_modules())
    convolutions = [m for n, m in named.items() if n.endswith(("conv1", "conv2"))]
    assert len(convolutions) == 19
    assert all(isinstance(m.bn, torch.nn.BatchNorm2d) for m in convolutions)  # fused
    sums = [n for n in model.graph.nodes if n.op == "call_function" and getattr(n.target, "__name__", "") == "add"]
    assert len(sums) == 9
    for node in sums:
        assert all(edge_bits(model, argument) == 8 for argument in node.args)
    pads = [n for n in model.graph.nodes if n.target is F.pad]
    assert len(pads) == 2
    for pad in pads:  # sliced and padded between two edges: zero is on every grid
        assert edge_bits(model, pad.args[0].args[0]) == 8
        assert [edge_bits(model, user) for user in pad.users] == [8]


def edge_bits(model: fx.GraphModule, node: fx.Node) -> int:
    assert node.op == "call_module"
    return int(model.get_submodule(node.target).bit_width())


def test_converted_and_lowered_it_computes_what_was_trained():
    torch.manual_seed(1)
    images = torch.randn(8, 3, 32, 32)
    loader = [(images, torch.zeros(8, dtype=torch.int64))]
    model = fq.prepare(create_model("resnet20"), RULES, calibration=loader, backend="x86")
    fq.freeze(model)
    reference = fq.convert(model)
    with torch.no_grad():
        assert torch.equal(model(images), reference(images))
        assert (fq.lower(reference)(images).argmax(1) == reference(images).argmax(1)).all()


@needs_shared("data/resnet20_cifar10_jpeg.pt", "data/cifar10-jpeg/test.tar")
def test_the_shared_checkpoint_loads_strictly_and_is_as_accurate_as_it_says(shared):
    model = create_model("resnet20").eval()
    model.load_state_dict(torch.load(shared / "data/resnet20_cifar10_jpeg.pt", weights_only=True))
    images, labels, classes = read_cifar10(shared / "data/cifar10-jpeg", parts=("test",))["test"]
    assert (len(images), len(classes)) == (10_000, 10)
    chosen = torch.arange(0, 10_000, 10)  # the file is sorted by class
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        predicted = torch.cat([model((x.float() / 255 - mean) / std).argmax(1) for x in images[chosen].split(250)])
    accuracy = 100 * (predicted == labels[chosen]).double().mean().item()
    assert abs(accuracy - 88.4) < 2.5  # 2.5 standard deviations of 1,000 images; 88.42 on all

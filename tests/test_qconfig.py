"""Plain torch.ao: its own prepare, convert and mapping setters, with fxquant's qconfigs and backend config alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.ao.nn.quantized as nnq
from torch import nn
from torch.ao.quantization import disable_fake_quant, disable_observer, enable_fake_quant, enable_observer
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_qat_fx
from torch.nn import functional as F

import fxquant as fq
from fxquant.errors import SpecError, UnknownNameError
from fxquant.estimators import ESTIMATORS, LSQ, NIPQ, Estimator
from fxquant.layers import QATConv2d, QATLayer, QATLinear
from fxquant.lower.native import Recorder
from fxquant.qconfig import EdgeFakeQuantize

BACKEND = next(b for b in ("x86", "fbgemm", "onednn", "qnnpack") if b in torch.backends.quantized.supported_engines)
BACKEND_CONFIG = fq.get_backend_config(BACKEND)


class Plain(nn.Module):
    """conv-bn-relu, a residual block, pooling and a classifier, written so that torch.ao needs no help with it."""

    def __init__(self, channels: int = 16, relu: bool = True):
        super().__init__()
        self.relu = F.relu if relu else lambda x: x
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, channels)
        self.head = nn.Linear(channels, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        y = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(y)) + x)
        return self.head(self.relu(self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))))


LAYERS = ("stem", "conv1", "conv2", "fc", "head")
PROTOTYPES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(7))


def task(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four prototypes in noise: learnt in seconds."""
    labels = torch.randint(4, (count,))
    return PROTOTYPES[labels] + 0.7 * torch.randn(count, 3, 12, 12), labels


def fit(model: nn.Module, steps: int, lr: float) -> nn.Module:
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=lr)
    model.train()
    for _ in range(steps):
        images, labels = task(64)
        loss = F.cross_entropy(model(images), labels)
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def float_model() -> nn.Module:
    torch.manual_seed(0)
    return fit(Plain(), 40, 3e-3).eval()


def prepared(model: nn.Module, mapping) -> nn.Module:
    images, _ = task(8)
    return prepare_qat_fx(copy.deepcopy(model).train(), mapping, (images,), backend_config=BACKEND_CONFIG)


@pytest.fixture(scope="module", params=sorted(ESTIMATORS))
def trained(request, float_model) -> nn.Module:
    """Prepared by torch.ao and trained for a few steps, in eval."""
    torch.manual_seed(0)
    mapping = fq.get_qat_qconfig_mapping(request.param, weight_bits=4, activation_bits=4)
    return fit(prepared(float_model, mapping), 15, 1e-3).eval()


@pytest.fixture
def engine():
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = BACKEND
    yield
    torch.backends.quantized.engine = before


def frozen_copy(model: nn.Module) -> nn.Module:
    """The fake-quant model that torch.ao's convert sees: it freezes each layer, which rounds biases to int32."""
    frozen = copy.deepcopy(model)
    for module in frozen.modules():
        if isinstance(module, (QATLayer, Estimator)):
            module.freeze()
    return frozen


def output_step(model: nn.Module) -> float:
    """What one 8-bit code of the output is worth."""
    edge = model.get_submodule(next(n for n in reversed(model.graph.nodes) if n.op == "call_module").target)
    assert isinstance(edge, EdgeFakeQuantize)
    return float(edge.calculate_qparams()[0])


def recorded(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        recorder = Recorder(model)
        recorder.run(images)
    return recorder.values


# ---- conversion by torch.ao ------------------------------------------------------------------------------


@torch.no_grad()
def test_the_reference_of_torch_ao_computes_what_was_trained(trained):
    images, _ = task(256)
    want, frozen = trained(images), frozen_copy(trained)(images)
    got = convert_to_reference_fx(copy.deepcopy(trained), backend_config=BACKEND_CONFIG)(images)
    assert (got.argmax(1) == want.argmax(1)).float().mean() >= 0.99
    # The same code of the 8-bit output, to half a step. Only sums that float32 adds in another order can fall on the
    # other side of a tie, somewhere in the network: in hardly any image.
    codes = ((got - frozen) / output_step(trained)).abs()
    assert (codes < 0.5).float().mean() >= 0.99
    assert codes.mean() < 0.05


@torch.no_grad()
def test_the_integer_model_of_torch_ao_computes_what_was_trained(trained, engine):
    images, _ = task(256)
    want, frozen = trained(images), frozen_copy(trained)(images)
    converted = convert_fx(copy.deepcopy(trained), backend_config=BACKEND_CONFIG)
    for name in LAYERS:
        assert isinstance(converted.get_submodule(name), nnq.Linear if name in ("fc", "head") else nnq.Conv2d)
    targets = {str(node.target) for node in converted.graph.nodes if node.op == "call_function"}
    assert any("quantized.add_relu" in target for target in targets)
    got = converted(images)
    assert (got.argmax(1) == want.argmax(1)).float().mean() >= 0.99
    # As above, and the kernels round the products of their scales in another order: more ties, of 8-bit codes.
    codes = ((got - frozen) / output_step(trained)).abs()
    assert (codes < 0.5).float().mean() >= 0.95
    assert codes.mean() < 0.1


@torch.no_grad()
def test_freezing_strays_from_eval_by_the_rounding_of_biases_alone(trained):
    layer = trained.get_submodule("stem")
    images, _ = task(16)
    _, _, _, sum_scale = frozen_copy(trained).get_submodule("stem").integer_parameters()
    gap = (frozen_copy(trained).get_submodule("stem")(images) - layer(images)).abs()
    assert (gap <= sum_scale[:, None, None] / 2 + 1e-5).all()


def spy_on_inputs(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each layer's input quantizer passes on, by the layer's name."""
    seen = {}
    handles = [
        layer.input_fake_quant.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        for name, layer in model.named_modules()
        if isinstance(layer, QATLayer)
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


def test_layers_take_4_bit_codes_and_sums_are_8_bit(trained):
    images, _ = task(64)
    seen = spy_on_inputs(trained, images)
    assert set(seen) == set(LAYERS)
    assert all(2 <= tensor.unique().numel() <= 16 for tensor in seen.values())
    for name in LAYERS:
        assert trained.get_submodule(name).input_fake_quant.whole_bits == 4
        weight = trained.get_submodule(name)
        assert weight.weight_fake_quant.codes(weight.weight).abs().max() <= 7
    edges = [m for m in trained.modules() if isinstance(m, EdgeFakeQuantize)]
    assert edges
    assert all(edge.bits == edge.whole_bits == 8 for edge in edges)
    values = recorded(trained, images)
    after_add = next(n for n in trained.graph.nodes if n.name == "relu_2").next
    assert isinstance(trained.get_submodule(after_add.target), EdgeFakeQuantize)
    assert 16 < values[after_add.name].unique().numel() <= 256


def test_converted_layers_still_take_4_bit_codes(trained, engine):
    images, _ = task(64)
    for convert in (convert_to_reference_fx, convert_fx):
        converted = convert(copy.deepcopy(trained), backend_config=BACKEND_CONFIG)
        seen = {}
        entries = {n: m for n, m in converted.named_modules() if n.endswith("input_quantize")}
        assert len(entries) == len(LAYERS)
        for name, entry in entries.items():
            entry.register_forward_hook(lambda m, a, out, name=name, seen=seen: seen.update({name: out}))
        with torch.no_grad():
            converted(images)
        assert len(seen) == len(LAYERS), f"{convert.__name__} never re-quantizes the input of some layer"
        assert all(codes.max() <= 15 for codes in seen.values())


# ---- mapping ---------------------------------------------------------------------------------------------


def widths(model: nn.Module) -> dict[str, tuple]:
    """(estimator, weight bits, input bits) by layer."""
    return {
        name: (m.weight_fake_quant.name, m.weight_fake_quant.whole_bits, m.input_fake_quant.whole_bits)
        for name, m in model.named_modules()
        if isinstance(m, QATLayer)
    }


def edges_are_8_bit(model: nn.Module) -> bool:
    edges = [m for m in model.modules() if isinstance(m, EdgeFakeQuantize)]
    return bool(edges) and all(edge.whole_bits == 8 for edge in edges)


def test_setters_mix_estimators_and_widths():
    # Without the ReLU after fc: torch.ao refuses set_object_type on a part of what it fuses.
    mapping = fq.get_qat_qconfig_mapping("lsq", 4, 4)
    mapping.set_module_name("stem", fq.get_qat_qconfig("ste", 8, 8))
    mapping.set_module_name_regex(r"conv\d", fq.get_qat_qconfig("nipq", 3, 2))
    mapping.set_object_type(nn.Linear, fq.get_qat_qconfig("pege", 5, 6))
    model = prepared(Plain(relu=False), mapping)
    assert widths(model) == {
        "stem": ("ste", 8, 8),
        "conv1": ("nipq", 3, 2),
        "conv2": ("nipq", 3, 2),
        "fc": ("pege", 5, 6),
        "head": ("pege", 5, 6),
    }
    assert edges_are_8_bit(model)
    fit(model, 2, 1e-3)
    with torch.no_grad():
        images, _ = task(4)
        reference = convert_to_reference_fx(copy.deepcopy(model.eval()), backend_config=BACKEND_CONFIG)
        assert torch.isfinite(reference(images)).all()


def test_additions_stay_8_bit_under_a_regex_that_matches_everything(float_model):
    mapping = fq.get_qat_qconfig_mapping("lsq", 8, 8).set_module_name_regex(".*", fq.get_qat_qconfig("lsq", 2, 2))
    model = prepared(float_model, mapping)
    assert set(widths(model).values()) == {("lsq", 2, 2)}
    assert edges_are_8_bit(model)
    fit(model, 1, 1e-3)
    images, _ = task(64)
    values = recorded(model.eval(), images)
    after_add = next(n for n in model.graph.nodes if n.name == "relu_2").next
    assert values[after_add.name].unique().numel() > 4


def test_a_layer_without_qconfig_stays_float(float_model):
    mapping = fq.get_qat_qconfig_mapping("lsq", 4, 4).set_module_name("head", None)
    model = prepared(float_model, mapping)
    assert type(model.head) is nn.Linear
    assert isinstance(model.fc, QATLinear)
    converted = convert_to_reference_fx(copy.deepcopy(fit(model, 1, 1e-3).eval()), backend_config=BACKEND_CONFIG)
    assert type(converted.head) is nn.Linear


@pytest.mark.parametrize("per_channel", [True, False])
def test_per_channel_gives_one_scale_a_channel(float_model, per_channel):
    model = prepared(float_model, fq.get_qat_qconfig_mapping("lsq", 4, 4, per_channel=per_channel))
    assert model.conv1.weight_fake_quant.log2_scale.shape == ((16,) if per_channel else (1,))
    assert model.conv1.weight_fake_quant.is_per_channel is per_channel


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_mapping_can_be_copied_and_pickled(float_model, duplicate):
    mapping = fq.get_qat_qconfig_mapping("nipq", 4, (2, 6), options={"sampler": "histogram"})
    mapping.set_module_name("stem", fq.get_qat_qconfig("ewgs", 8, 8, options={"delta": 0.2}))
    model = prepared(float_model, duplicate(mapping))
    assert model.stem.weight_fake_quant.delta == 0.2
    assert isinstance(model.conv1.input_fake_quant, NIPQ)
    assert model.conv1.input_fake_quant.bits == (2, 6)
    assert model.conv1.input_fake_quant.sampler == "histogram"


def test_activations_in_place_train():
    """They overwrite what an edge gave; timm's squeeze-and-excite and MobileNets are built that way."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Hardswish(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Hardsigmoid(inplace=True),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    images, mapping = torch.randn(8, 3, 12, 12), fq.get_qat_qconfig_mapping("lsq", 4, 4)
    prepared = prepare_qat_fx(model.train(), mapping, (images,), backend_config=BACKEND_CONFIG)
    prepared(images).square().sum().backward()
    edges = [m for m in prepared.modules() if isinstance(m, EdgeFakeQuantize)]
    assert any(m.log2_scale.grad is not None for m in edges)
    assert all(torch.isfinite(p.grad).all() for p in prepared.parameters() if p.grad is not None)


def test_each_layer_has_quantizers_of_its_own(float_model):
    model = prepared(float_model, fq.get_qat_qconfig_mapping("lsq", 4, 4))
    owned = [q for m in model.modules() if isinstance(m, QATLayer) for q in (m.input_fake_quant, m.weight_fake_quant)]
    assert len({id(q) for q in owned}) == 2 * len(LAYERS)


# ---- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_parameters_exist_after_prepare_and_keep_their_names_and_shapes(float_model, estimator):
    model = prepared(float_model, fq.get_qat_qconfig_mapping(estimator, 4, 4))
    before = {name: (id(p), p.shape) for name, p in model.named_parameters()}
    assert any(name.startswith("conv1.input_fake_quant") for name in before)
    assert any(name.startswith("conv1.weight_fake_quant") for name in before) or estimator == "gdnsq"
    fit(model, 1, 1e-3)
    assert before == {name: (id(p), p.shape) for name, p in model.named_parameters()}


def test_bn_and_relu_are_inside_of_the_layer(float_model):
    model = prepared(float_model, fq.get_qat_qconfig_mapping("lsq", 4, 4))
    assert isinstance(model.stem, QATConv2d)
    assert model.stem.relu
    assert model.stem.bn is not None
    assert not model.conv2.relu
    assert torch.equal(model.stem.bn.running_mean, float_model.bn.running_mean)


def test_switches_of_torch_ao_work(float_model):
    model = prepared(float_model, fq.get_qat_qconfig_mapping("lsq", 2, 2))
    images, _ = task(32)
    with torch.no_grad():
        model(images)
        quantized = model.eval()(images)
        model.apply(disable_fake_quant)
        assert torch.allclose(model(images), _float_of(model)(images), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(images), quantized, atol=1e-2)
        model.apply(enable_fake_quant)
        assert torch.equal(model(images), quantized)


def _float_of(model: nn.Module) -> nn.Module:
    """The float model with a prepared model's weights and statistics."""
    out = Plain().eval()
    for name, bn in (("stem", "bn"), ("conv1", "bn1"), ("conv2", "bn2"), ("fc", None), ("head", None)):
        layer = model.get_submodule(name)
        out.get_submodule(name).weight.data.copy_(layer.weight)
        if bn is not None:
            out.get_submodule(bn).load_state_dict(layer.bn.state_dict())
        else:
            out.get_submodule(name).bias.data.copy_(layer.bias)
    return out


def test_without_observers_ranges_are_not_set(float_model):
    model = prepared(float_model, fq.get_qat_qconfig_mapping("lsq", 4, 4))
    model.apply(disable_observer)
    images, _ = task(8)
    with pytest.raises(SpecError, match=r"no range has been set yet\. Run a calibration batch"):
        model(images)
    model.apply(enable_observer)
    model(images)
    ranges = {n: m.calculate_qparams()[0] for n, m in model.named_modules() if isinstance(m, Estimator)}
    model(100 * images)  # ranges come from the first data, then they are learned, not observed
    assert all(torch.equal(model.get_submodule(n).calculate_qparams()[0], scale) for n, scale in ranges.items())


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_zero_initialised_gammas_give_no_nan(estimator):
    model = Plain(8)
    nn.init.zeros_(model.bn2.weight)
    quantized = prepared(model, fq.get_qat_qconfig_mapping(estimator, 4, 4))
    fit(quantized, 4, 1e-2)
    assert all(torch.isfinite(p).all() for p in quantized.parameters())
    images, _ = task(8)
    nn.init.zeros_(quantized.conv2.bn.weight)
    reference = convert_to_reference_fx(copy.deepcopy(quantized.eval()), backend_config=BACKEND_CONFIG)
    with torch.no_grad():
        assert torch.isfinite(quantized(images)).all()
        assert torch.isfinite(reference(images)).all()


# ---- what is refused -------------------------------------------------------------------------------------


def test_names_are_checked():
    with pytest.raises(UnknownNameError, match=r"unknown estimator 'lsqq': did you mean 'lsq'\?"):
        fq.get_qat_qconfig("lsqq")
    with pytest.raises(UnknownNameError, match=r"unknown backend 'x68': did you mean 'x86'\?"):
        fq.get_backend_config("x68")
    with pytest.raises(UnknownNameError, match=r"option of the estimator 'ewgs' 'detla': did you mean 'delta'\?"):
        fq.get_qat_qconfig("ewgs", options={"detla": 1.0})
    with pytest.raises(SpecError, match=r"weight_bits=9 was asked for; widths are whole numbers of bits from 1 to 8"):
        fq.get_qat_qconfig_mapping("lsq", weight_bits=9)
    with pytest.raises(SpecError, match=r"residual_bits=12 was asked for"):
        fq.get_qat_qconfig("lsq", residual_bits=12)


@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max")
def test_a_foreign_qconfig_is_refused():
    from torch.ao.quantization import get_default_qat_qconfig_mapping

    with pytest.raises(SpecError, match=r"QConfig's weight is a FusedMovingAvg.*use fxquant\.get_qat_qconfig"):
        prepared(Plain(8), get_default_qat_qconfig_mapping("x86"))


def test_an_edge_is_a_learned_step():
    assert issubclass(EdgeFakeQuantize, LSQ)
    assert EdgeFakeQuantize.name not in ESTIMATORS

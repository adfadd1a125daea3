"""Networks that recipes name and timm does not have; :mod:`fxquant.timm` registers them.

ResNet-20 for CIFAR-10 (He et al., CVPR 2016, section 4.2): three stages of three blocks at 16, 32 and 64 channels,
shortcuts without parameters (option A: every other pixel, zeros for the channels that are new). The names of its
parameters are those of the checkpoints in use (``conv1``, ``bn1``, ``layer1.0.conv1``, ..., ``linear``).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

_WIDTHS, _DEPTH = (16, 32, 64), 3


class CifarBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to what came in.

    Args:
        channels: [in, out]; the new ones are zeros in the shortcut, half of them on either side.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, channels: tuple[int, int], stride: int):
        super().__init__()
        inner, outer = channels
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.stride, self.new = stride, outer - inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new:
            x = F.pad(x, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """[N, in_chans, H, W] to [N, num_classes]; 0.27 million parameters, 41 million MACs at 32x32 pixels."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3):
        super().__init__()
        self.num_classes, self.num_features = num_classes, _WIDTHS[-1]
        self.conv1 = nn.Conv2d(in_chans, _WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        before = _WIDTHS[0]
        for stage, width in enumerate(_WIDTHS, 1):
            first = CifarBlock((before, width), stride=1 if stage == 1 else 2)
            rest = [CifarBlock((width, width), stride=1) for _ in range(_DEPTH - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
            before = width
        self.linear = nn.Linear(before, num_classes)
        for module in self.modules():  # as in the paper: He et al., ICCV 2015
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))

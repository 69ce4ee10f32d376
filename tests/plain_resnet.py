"""ResNet-50 in plain torch.nn, with torchvision's names: what the fused network must equal."""

from __future__ import annotations

from torch import Tensor, nn


class PlainBottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        stride_in_1x1: bool,
        eps: float,
        momentum: float,
        groups: int = 1,
        width_per_group: int = 64,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        out, width = 4 * width, int(width * width_per_group / 64) * groups
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps, momentum)
        self.conv2 = nn.Conv2d(width, width, 3, second, dilation, dilation, groups, False)
        self.bn2 = nn.BatchNorm2d(width, eps, momentum)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out, eps, momentum)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out, 1, stride, bias=False),
                nn.BatchNorm2d(out, eps, momentum),
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return self.relu(h + (x if self.downsample is None else self.downsample(x)))


class PlainResNet50(nn.Module):
    """The network, with what differs between its variants as arguments."""

    def __init__(
        self,
        num_classes: int = 1000,
        stride_in_1x1: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        pool_padding: int = 1,
        groups: int = 1,
        width_per_group: int = 64,
        dilate: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64, eps, momentum)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, pool_padding)
        channels, dilation = 64, 1
        for i, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
            stage = []
            for b in range(blocks):
                dilates = i > 0 and b == 0 and dilate[i - 1]
                stride = 2 if i > 0 and b == 0 and not dilates else 1
                common = (stride_in_1x1, eps, momentum, groups, width_per_group, dilation)
                stage.append(PlainBottleneck(channels, width, stride, *common))
                channels, dilation = 4 * width, 2 * dilation if dilates else dilation
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.fc(self.avgpool(h).flatten(1))


VARIANTS = {
    "torchvision": {},
    "keras": {"stride_in_1x1": True, "eps": 1.001e-5, "momentum": 0.01},
    "coursera": {"stride_in_1x1": True, "eps": 1e-3, "momentum": 0.01, "pool_padding": 0},
}

"""The ResNet of He et al. 2015 (arXiv 1512.03385) for small images: torchvision's, whose parameter names it keeps,
but with a 3×3 first convolution of stride 1 and no pooling after it, as is usual on CIFAR.
"""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1


class ResNet(nn.Module):
    """Images [B, C, S, S], normalised, to logits [B, K].

    Four stages of `depth` residual blocks each; from the second on, a stage halves the side, rounding up, and
    doubles the channels, which are `width` at first. Depth 2 at width 64 is ResNet-18.
    """

    def __init__(self, depth: int, width: int, num_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(width, width, depth, stride=1)
        self.layer2 = _stage(width, 2 * width, depth, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, depth, stride=2)
        self.layer4 = _stage(4 * width, 8 * width, depth, stride=2)
        self.fc = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def _stage(num_in: int, num_out: int, depth: int, stride: int) -> nn.Sequential:
    """`depth` residual blocks, the first of which changes side and channels, around a 1×1 convolution that does too."""
    shortcut = nn.Sequential(conv1x1(num_in, num_out, stride), nn.BatchNorm2d(num_out)) if stride > 1 else None
    first = BasicBlock(num_in, num_out, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(num_out, num_out) for _ in range(depth - 1)))

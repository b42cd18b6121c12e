"""VGG-16 with BatchNorm (Simonyan & Zisserman 2015): thirteen convolutions, and one linear layer or three."""

from torch import nn

from .parts import draw_convolutions

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions


def vgg16bn(classes: int, narrower: int = 1, large: bool = False) -> nn.Sequential:
    """Convolutions keep the bias that the BatchNorm after them makes idle, as in the published counts.

    Args:
        classes: outputs.
        narrower: divides the channels.
        large: for 224 x 224 pixels, with three linear layers and dropout, in place of 32 x 32 and one.
    """
    layers: list[nn.Module] = []
    inputs = 3
    for channels, count in STAGES:
        width = channels // narrower
        for _ in range(count):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    if large:
        hidden = 4096 // narrower
        for count in (7 * 7 * inputs, hidden):
            layers += [nn.Linear(count, hidden), nn.ReLU(), nn.Dropout()]
        inputs = hidden
    model = nn.Sequential(*layers, nn.Linear(inputs, classes))
    draw_convolutions(model)
    return model

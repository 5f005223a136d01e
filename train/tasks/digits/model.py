"""A small convolutional network for 8x8 images."""

from __future__ import annotations

import torch
from torch import nn


class DigitsNet(nn.Module):
    """Two convolutions, one max-pooling and two linear layers, similar to LeNet-5 (LeCun et al.,
    1998, "Gradient-based learning applied to document recognition"), with ReLU and dropout
    (Srivastava et al., 2014).

    ``forward`` takes images (B, 1, 8, 8) float in [0, 1] and returns logits (B, 10) float32.
    """

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(2 * channels * 4 * 4, 4 * channels),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4 * channels, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, 10) of images (B, 1, 8, 8)."""
        logits: torch.Tensor = self.head(self.features(images))
        return logits.float()

    def flops_per_sample(self) -> int:
        """FLOPs of the forward and backward pass of one image: 6 per use of a weight; weights of a
        convolution are used at each of the 64 pixels."""
        weights = 0
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                weights += 8 * 8 * module.weight.numel()
            elif isinstance(module, nn.Linear):
                weights += module.weight.numel()
        return 6 * weights

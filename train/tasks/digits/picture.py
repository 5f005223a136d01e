"""An image grid of digits with their predicted labels."""

from __future__ import annotations

import torch

_GLYPHS = (  # 3x5 pixels for each digit, row by row
    "111101101101111",
    "010110010010111",
    "111001111100111",
    "111001111001111",
    "101101111001001",
    "111100111001111",
    "111100111101111",
    "111001010010010",
    "111101111101111",
    "111101111001111",
)
_RIGHT = torch.tensor([0.3, 0.8, 0.4])
_WRONG = torch.tensor([1.0, 0.3, 0.3])


def draw(
    images: torch.Tensor, predicted: torch.Tensor, labels: torch.Tensor, columns: int, scale: int
) -> torch.Tensor:
    """A grid of digits, each with its predicted label to the right: green if correct, else red.

    images (N, 1, 8, 8) in [0, 1], predicted and labels (N,) int64, all on the CPU. Returns
    (3, H, W) float32 in [0, 1], with H = 10 * scale * ceil(N / columns), W = 14 * scale * columns.
    """
    glyphs = torch.tensor([[float(c) for c in g] for g in _GLYPHS]).view(10, 5, 3)
    rows = -(-len(images) // columns)
    picture = torch.zeros(3, rows * 10, columns * 14)
    for n, (image, guess, label) in enumerate(zip(images, predicted, labels, strict=True)):
        top, left = n // columns * 10 + 1, n % columns * 14 + 1
        picture[:, top : top + 8, left : left + 8] = image
        colour = _RIGHT if guess == label else _WRONG
        picture[:, top + 2 : top + 7, left + 9 : left + 12] = (
            colour[:, None, None] * glyphs[int(guess)]
        )
    return picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2)

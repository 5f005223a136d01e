"""The handwritten digits of scikit-learn, split into training and test data."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from train.imports import import_extra


class Digits(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images and labels in memory.

    A sample is an image (1, 8, 8) float32 in [0, 1] and its label, a scalar int64 in 0..9. With
    ``augment``, each image is shifted by up to one pixel in both directions, drawn from torch's
    global generator.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, augment: bool) -> None:
        self.images = images
        self.labels = labels
        self.augment = augment
        self.deterministic = not augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        if self.augment:
            down, right = torch.randint(0, 3, (2,)).tolist()
            image = F.pad(image, (1, 1, 1, 1))[:, down : down + 8, right : right + 8]
        return image, self.labels[index]


def load_digits_split(test_ratio: float, split_seed: int, augment: bool) -> tuple[Digits, Digits]:
    """Training and test data: a stratified split of the 1,797 images of the UCI optical digits'
    test set (Alpaydin and Kaynak, 1998)."""
    datasets = import_extra("sklearn.datasets", "digits", "task.use=digits")
    selection = import_extra("sklearn.model_selection", "digits", "task.use=digits")

    pixels, labels = datasets.load_digits(return_X_y=True)
    train, test = selection.train_test_split(
        range(len(labels)), test_size=test_ratio, random_state=split_seed, stratify=labels
    )
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16  # 17 grey levels
    classes = torch.from_numpy(labels).long()
    return Digits(images[train], classes[train], augment), Digits(
        images[test], classes[test], False
    )

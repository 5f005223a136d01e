"""The task ``digits``: classify 8x8 images of handwritten digits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from train.section import Section, names_for_editors
from train.tasks.base import Ratio, Task
from train.tasks.losses import CROSS_ENTROPY, Loss, check_loss

if TYPE_CHECKING:
    import torch
    from torch import nn

    from train.tasks.digits.data import Digits


class DigitsTask(Task):
    """Classifies handwritten digits; a batch is images (B, 1, 8, 8) and labels (B,)."""

    class Options(Section):
        """The loss, and what is shown after an evaluation."""

        loss: str = Field(CROSS_ENTROPY, json_schema_extra=names_for_editors([CROSS_ENTROPY]))
        """cross_entropy, or the dotted path of a function of (logits, targets) that returns the
        loss of each image or their sum."""

        shown: int = Field(32, ge=1)
        """Test digits in the image grid, those with the least probable true label first."""

        _check_loss = field_validator("loss")(check_loss)

    class Model(Section):
        """The convolutional network."""

        channels: int = Field(32, ge=1)
        """Channels of the first convolution; the second has twice as many."""

        dropout: float = Field(0.2, ge=0.0, lt=1.0)
        """Probability of dropping an input of a linear layer."""

    class Data(Section):
        """The split and the augmentation."""

        test_ratio: float = Field(0.2, gt=0.0, lt=1.0)
        """Ratio of the images used for testing, equal for all ten digits."""

        split_seed: int = Field(0, ge=0)
        """Seed of the split into training and test data, independent of the run's seed."""

        augment: bool = True
        """Shift each training image by up to one pixel in both directions."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._loss = Loss(config.task.loss)

    def build_model(self) -> nn.Module:
        """The network, (B, 1, 8, 8) to (B, 10)."""
        from train.tasks.digits.model import DigitsNet

        return DigitsNet(self.config.model.channels, self.config.model.dropout)

    @cached_property
    def _split(self) -> tuple[Digits, Digits]:
        from train.tasks.digits.data import load_digits_split

        data = self.config.data
        return load_digits_split(data.test_ratio, data.split_seed, data.augment)

    def train_dataset(self) -> Digits:
        """The training images."""
        return self._split[0]

    def eval_dataset(self) -> Digits:
        """The test images."""
        return self._split[1]

    def loss(self, model: nn.Module, batch: Any) -> Ratio:
        """``task.loss``, by default cross entropy in nats, summed over the images."""
        return self._loss_and_logits(model, batch)[0]

    def _loss_and_logits(self, model: nn.Module, batch: Any) -> tuple[Ratio, torch.Tensor]:
        images, labels = batch
        logits = model(images)
        return Ratio(self._loss.sum(logits, labels), len(labels)), logits

    def measure(self, model: nn.Module, batch: Any) -> Mapping[str, Ratio]:
        """``loss`` in nats per image and ``accuracy``, the ratio of correctly classified images."""
        loss, logits = self._loss_and_logits(model, batch)
        right = (logits.argmax(dim=1) == batch[1]).sum()
        return {"loss": loss, "accuracy": Ratio(right, len(batch[1]))}

    def report(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """``least_probable``: the test digits with the least probable true label, as an image."""
        import torch

        from train.tasks.digits.picture import draw

        test = self.eval_dataset()
        with torch.no_grad():
            probabilities = model(test.images.to(device)).softmax(dim=1).cpu()
        of_label = probabilities.gather(1, test.labels[:, None]).squeeze(1)
        least = of_label.argsort(stable=True)[: self.config.task.shown]
        predicted = probabilities[least].argmax(dim=1)
        picture = draw(test.images[least], predicted, test.labels[least], columns=8, scale=4)
        return {"least_probable": picture}

    def facts(self) -> dict[str, float]:
        """Sizes of the two splits."""
        train, test = self._split
        return {"train_images": float(len(train)), "test_images": float(len(test))}

    def example_inputs(self) -> tuple[Any, ...]:
        """Two test images."""
        return (self.eval_dataset().images[:2].clone(),)

    def flops_per_sample(self) -> float:
        """See :meth:`train.tasks.digits.model.DigitsNet.flops_per_sample`."""
        import torch

        from train.tasks.digits.model import DigitsNet

        with torch.device("meta"):
            return float(DigitsNet(self.config.model.channels, 0.0).flops_per_sample())

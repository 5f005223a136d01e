"""The task ``digits``: it learns, splits without leaks, and draws its report."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train.tasks.digits.picture import draw
from train.tasks.digits.task import DigitsTask


def make(**data: Any) -> DigitsTask:
    return DigitsTask(
        SimpleNamespace(
            run=SimpleNamespace(seed=1),
            task=DigitsTask.Options(),
            model=DigitsTask.Model(),
            data=DigitsTask.Data(**data),
        )
    )


def rows(images: torch.Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


@pytest.mark.normal
def test_more_than_97_percent_after_a_short_training() -> None:
    torch.manual_seed(0)
    task = make()
    model, train = task.build_model(), task.train_dataset()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = 250
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = task.collate([train[i] for i in torch.randint(len(train), (64,)).tolist()])
        loss = task.loss(model, batch)
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    test = task.eval_dataset()
    accuracy = task.measure(model, (test.images, test.labels))["accuracy"]
    assert accuracy.count == 360
    assert int(accuracy.sum) / accuracy.count > 0.97


def test_the_split_is_complete_stratified_and_a_function_of_its_seed() -> None:
    task, again, other = make(), make(), make(split_seed=1)
    train, test = task.train_dataset(), task.eval_dataset()
    assert len(train) + len(test) == 1797
    assert not set(rows(train.images)) & set(rows(test.images))
    assert (torch.bincount(train.labels) - 4 * torch.bincount(test.labels)).abs().max() <= 5
    assert torch.equal(test.images, again.eval_dataset().images)
    assert not torch.equal(test.images, other.eval_dataset().images)


def test_augmentation_moves_by_at_most_a_pixel_and_follows_the_seed() -> None:
    train, plain = make().train_dataset(), make(augment=False).train_dataset()
    assert plain.deterministic
    assert not train.deterministic
    assert make().eval_dataset().deterministic
    torch.manual_seed(3)
    seen = {train[5][0].numpy().tobytes() for _ in range(200)}
    wide = torch.nn.functional.pad(plain[5][0], (1, 1, 1, 1))
    moved = {
        wide[:, r : r + 8, c : c + 8].contiguous().numpy().tobytes()
        for r in range(3)
        for c in range(3)
    }
    assert seen == moved
    torch.manual_seed(3)
    first = train[5][0]
    torch.manual_seed(3)
    assert torch.equal(train[5][0], first)


def test_loss_and_accuracy_add_up_over_micro_batches() -> None:
    task = make()
    model = task.build_model().eval()
    test = task.eval_dataset()
    batch = (test.images[:48], test.labels[:48])
    parts = [(test.images[a:b], test.labels[a:b]) for a, b in ((0, 7), (7, 30), (30, 48))]
    with torch.no_grad():
        whole = task.measure(model, batch)
        split = [task.measure(model, part) for part in parts]
    for name in ("loss", "accuracy"):
        assert sum(float(part[name].sum) for part in split) == pytest.approx(float(whole[name].sum))
        assert sum(part[name].count for part in split) == whole[name].count == 48
    assert task.count(batch) == 48


def test_the_picture_shows_the_errors_first_and_repeats() -> None:
    task = make()
    torch.manual_seed(0)
    model = task.build_model().eval()  # as in an evaluation
    state = torch.get_rng_state()
    picture = task.report(model, torch.device("cpu"))["least_probable"]
    assert torch.equal(torch.get_rng_state(), state)
    assert picture.shape == (3, 4 * 4 * 10, 8 * 4 * 14)
    assert picture.dtype == torch.float32
    assert 0 <= picture.min() < picture.max() <= 1
    assert torch.equal(task.report(model, torch.device("cpu"))["least_probable"], picture)


def test_wrong_labels_are_red_and_right_ones_green() -> None:
    picture = draw(
        torch.zeros(2, 1, 8, 8), torch.tensor([1, 7]), torch.tensor([1, 2]), columns=2, scale=1
    )
    right, wrong = picture[:, :, :14].amax((1, 2)), picture[:, :, 14:].amax((1, 2))
    assert right[1] > right[0]
    assert wrong[0] > wrong[1]


def test_example_inputs_go_through_the_model() -> None:
    task = make()
    assert task.build_model()(*task.example_inputs()).shape == (2, 10)


def test_flops_count_each_use_of_a_weight() -> None:
    task = make()
    uses = 64 * (9 * 32) + 64 * (9 * 32 * 64) + 1024 * 128 + 128 * 10
    assert task.flops_per_sample() == 6 * uses

"""Objects of torchmetrics for the tests. A module of its own, since its import takes seconds."""

import torch
import torchmetrics
from torchmetrics import Metric, MetricCollection, classification, retrieval, text

CLASSES = 3


def ranked(batch):
    """Arguments of retrieval metrics: score, relevance, query."""
    return batch["scores"][:, 0], batch["label"] == 0, batch["index"] // 4


def sentences(batch):
    names = [
        f"the {label} of {index}"
        for label, index in zip(batch["label"], batch["index"], strict=True)
    ]
    return names, ["the 0 of 5"] * len(names)


def only_rare(batch):
    """Arguments for the samples of the last class; None where a batch has none."""
    rare = batch["label"] == CLASSES - 1
    return (batch["scores"][rare], batch["label"][rare]) if rare.any() else None


OBJECTS = {
    "sums": (lambda: classification.MulticlassAccuracy(CLASSES), None),
    "one number per class": (lambda: classification.MulticlassF1Score(CLASSES, average=None), None),
    "a matrix": (lambda: classification.MulticlassConfusionMatrix(CLASSES), None),
    "lists that are joined": (lambda: classification.MulticlassAUROC(CLASSES), None),
    "lists that are not": (retrieval.RetrievalMAP, ranked),
    "lists of scalars": (lambda: text.ROUGEScore(rouge_keys="rouge1"), sentences),
    "moments": (
        torchmetrics.PearsonCorrCoef,
        lambda b: (b["scores"][:, 0], b["scores"][:, 1]),
    ),
    "a collection": (
        lambda: MetricCollection(
            [classification.MulticlassPrecision(CLASSES), classification.MulticlassRecall(CLASSES)]
        ),
        None,
    ),
    "nested collections": (
        lambda: MetricCollection(
            {
                "a": MetricCollection([classification.MulticlassRecall(CLASSES, average=None)]),
                "b": classification.MulticlassAUROC(CLASSES),
            }
        ),
        None,
    ),
    "a wrapper": (
        lambda: torchmetrics.ClasswiseWrapper(
            classification.MulticlassAccuracy(CLASSES, average=None)
        ),
        None,
    ),
    "some batches only": (lambda: classification.MulticlassAccuracy(CLASSES), only_rare),
    "some batches, a collection": (
        lambda: MetricCollection([classification.MulticlassRecall(CLASSES)]),
        only_rare,
    ),
}  # fmt: skip


class OfRank(Metric):
    """Returns whatever it is made with."""

    def __init__(self, value, reduce="sum"):
        super().__init__()
        self.value = value
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx=reduce)

    def update(self, scores, label):
        self.total = self.total + scores.sum()

    def compute(self):
        return self.value

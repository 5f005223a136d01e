"""The task ``text``: causal language modelling on text files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from train.exits import UsageError
from train.tasks.base import Ratio, Task
from train.tasks.losses import CROSS_ENTROPY, Loss
from train.tasks.text import text_config

if TYPE_CHECKING:
    import torch
    from torch import nn

    from train.tasks.text.data import Tokens, Windows
    from train.tasks.text.model import Transformer
    from train.tasks.text.tokenizer import Tokenizer


class TextTask(Task):
    """Causal language modelling; for a batch see :func:`train.tasks.text.data.collate`."""

    class Options(text_config.Options):
        """The loss, and the text that is generated after an evaluation."""

    class Model(text_config.Model):
        """The decoder-only transformer."""

    class Data(text_config.Data):
        """The corpus, its tokens and its samples."""

    unit: ClassVar[str] = "tokens"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._loss = Loss(config.task.loss)
        rows, context = config.model.context, config.data.context
        if rows is not None and rows < context:
            raise UsageError(
                f"data.context={context} is longer than the table of learned positions, "
                f"model.context={rows}; lower data.context or raise model.context."
            )

    def build_model(self) -> Transformer:
        """The transformer, tokens (B, T) int64 to logits (B, T, vocabulary) float32."""
        from train.tasks.text.model import Transformer

        rows = self.config.model.context or self.config.data.context
        return Transformer(self.config.model, self._tokenizer.vocabulary, rows)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from train.tasks.text.tokenizer import make_tokenizer

        return make_tokenizer(self.config.data)

    @cached_property
    def _split(self) -> tuple[Tokens, Tokens]:
        from train.tasks.text.corpus import read_documents, split_documents
        from train.tasks.text.data import check_length, tokenize

        data, tokenizer = self.config.data, self._tokenizer
        train, validation = split_documents(read_documents(data), data.validation, data.split_seed)
        tokens = tokenize(train, tokenizer)
        check_length(tokens, data.context)
        return tokens, tokenize(validation, tokenizer)

    def train_dataset(self) -> Windows:
        """Samples of the training documents."""
        return self._windows(self._split[0])

    def eval_dataset(self) -> Windows:
        """Samples of the validation documents."""
        return self._windows(self._split[1])

    def _windows(self, tokens: Tokens) -> Windows:
        from train.tasks.text.data import Windows

        return Windows(tokens, self.config.data.context, self.config.data.pack)

    def collate(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        """``tokens`` and ``targets`` (B, context) and ``bytes`` (B,), all int64."""
        from train.tasks.text.data import collate

        return collate(samples)

    def count(self, batch: Any) -> int:
        """The number of targets that are not padding."""
        return int((batch["targets"] != -100).sum())

    def loss(self, model: nn.Module, batch: Any) -> Ratio:
        """``task.loss``, by default cross entropy in nats, summed in float32 over the targets that
        are not padding."""
        return self._sum(self._loss, self._logits(model, batch), batch)

    def _logits(self, model: nn.Module, batch: Any) -> torch.Tensor:
        logits: torch.Tensor = model(batch["tokens"])
        return logits.float().flatten(0, 1)

    def _sum(self, loss: Loss, logits: torch.Tensor, batch: Any) -> Ratio:
        targets = batch["targets"]
        return Ratio(loss.sum(logits, targets.flatten()), (targets != -100).sum())

    def measure(self, model: nn.Module, batch: Any) -> Mapping[str, Ratio]:
        """``loss`` per token, and ``bits_per_byte``, which does not depend on the tokenizer: the
        bits of all targets over the UTF-8 bytes they stand for. With a loss of the user's,
        ``cross_entropy`` as well, in nats per token."""
        logits = self._logits(model, batch)
        metrics = {"loss": self._sum(self._loss, logits, batch)}
        nats = metrics["loss"]
        if not self._loss.is_cross_entropy:
            nats = metrics["cross_entropy"] = self._sum(Loss(CROSS_ENTROPY), logits, batch)
        metrics["bits_per_byte"] = Ratio(nats.sum / math.log(2), batch["bytes"].sum())
        return metrics

    def derive(self, totals: Mapping[str, Ratio]) -> dict[str, float]:
        """``perplexity``, the exponential of the cross entropy."""
        nats = totals.get("cross_entropy", totals["loss"])
        try:
            return {"perplexity": math.exp(nats.sum / nats.count)}
        except OverflowError:
            return {"perplexity": math.inf}

    def report(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """``sample``: the prompt and the text that the model generates after it."""
        return self._sample(model, device, self.config.task.sample_tokens)

    def check_report(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """A report with a sample of two tokens, the second of which follows a generated one."""
        return self._sample(model, device, min(self.config.task.sample_tokens, 2))

    def _sample(self, model: nn.Module, device: torch.device, length: int) -> dict[str, Any]:
        from train.data.order import report_seed
        from train.tasks.text.generate import generate

        options, tokenizer = self.config.task, self._tokenizer
        if length == 0:
            return {}
        ((ids, _),) = tokenizer.encode([options.prompt])
        prompt = ids.tolist()
        generated = generate(
            model,
            [tokenizer.end, *prompt],
            length,
            self.config.data.context,
            tokenizer.end,
            temperature=options.sample_temperature,
            top_k=options.sample_top_k,
            seed=report_seed(self.config.run.seed),
            device=device,
        )
        return {"sample": tokenizer.decode([*prompt, *generated])}

    def facts(self) -> dict[str, float]:
        """Sizes of both splits, and ``unigram_entropy`` in nats per token: the training loss of the
        best model without context."""
        from train.tasks.text.data import unigram_entropy

        train, validation = self._split
        return {
            "unigram_entropy": unigram_entropy(train),
            "train_tokens": float(len(train.targets)),
            "train_documents": float(len(train.document_starts)),
            "validation_tokens": float(len(validation.targets)),
            "validation_documents": float(len(validation.document_starts)),
        }

    def example_inputs(self) -> tuple[Any, ...]:
        """The tokens (2, context) int64 of two samples."""
        import torch

        dataset = self.eval_dataset()
        return (torch.stack([dataset[0]["tokens"], dataset[len(dataset) - 1]["tokens"]]),)

    def flops_per_sample(self) -> float:
        """See :meth:`train.tasks.text.model.Transformer.flops_per_token`."""
        import torch

        context = self.config.data.context
        with torch.device("meta"):
            model = self.build_model()
        return float(model.flops_per_token(context) * context)

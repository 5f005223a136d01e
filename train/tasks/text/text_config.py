"""The config sections of the task ``text``."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from train.section import Section, names_for_editors, non_semantic
from train.tasks.losses import CROSS_ENTROPY, check_loss


class Options(Section):
    """The loss, and the text that is generated after an evaluation."""

    loss: str = Field(CROSS_ENTROPY, json_schema_extra=names_for_editors([CROSS_ENTROPY]))
    """cross_entropy, or the dotted path of a function of (logits, targets) that returns the loss
    of each token or their sum."""

    prompt: str = non_semantic("The ")
    """Start of the generated text."""

    sample_tokens: int = non_semantic(300, ge=0)
    """Tokens to generate; 0 for no text."""

    sample_temperature: float = non_semantic(0.8, ge=0.0)
    """Divisor of the logits before the softmax; 0 takes the most probable token."""

    sample_top_k: int | None = non_semantic(None, ge=1)
    """Sample from this many most probable tokens only; null for all."""

    _check_loss = field_validator("loss")(check_loss)


class Model(Section):
    """The decoder-only transformer."""

    layers: int = Field(6, ge=1)
    """Number of blocks, each an attention and an MLP."""

    heads: int = Field(6, ge=1)
    """Attention heads of each block; must divide ``width``."""

    width: int = Field(384, ge=1)
    """Size of the residual stream, and of the token embedding."""

    mlp: Literal["gelu", "swiglu"] = "swiglu"
    """Kind of MLP: GELU (Hendrycks and Gimpel, 2016) or SwiGLU (Shazeer, 2020)."""

    hidden: int | None = Field(None, ge=1)
    """Hidden size of the MLP; null for 4 * width (gelu) or, with as many parameters,
    8/3 * width rounded up to a multiple of 8 (swiglu)."""

    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Kind of normalisation: RMSNorm (Zhang and Sennrich, 2019) or LayerNorm (Ba et al., 2016)."""

    positions: Literal["rotary", "learned"] = "rotary"
    """Rotary positions (Su et al., 2021) or a learned embedding of each position."""

    rotary_base: float = Field(10000.0, gt=0.0)
    """Base of the frequencies of rotary positions."""

    context: int | None = Field(None, ge=1)
    """Rows of the table of learned positions, the maximum input length; null for
    ``data.context``."""

    tied: bool = True
    """Share the output head's weight with the token embedding (Press and Wolf, 2017)."""

    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout probability of embeddings, attention weights and sublayer outputs."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError(
                f"model.width ({self.width}) must be a multiple of model.heads ({self.heads}), "
                "because the heads divide it evenly; change one of them."
            )
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError(
                f"model.width / model.heads ({self.width} / {self.heads} = "
                f"{self.width // self.heads}) must be even for model.positions=rotary, which "
                "rotates pairs; change one of them or set model.positions=learned."
            )
        if self.positions == "rotary" and self.context is not None:
            raise ValueError(
                f"model.context ({self.context}) is the size of a table of learned positions, but "
                "model.positions is rotary; remove model.context or set model.positions=learned."
            )
        return self


Ratio = Annotated[float, Field(gt=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]


class Data(Section):
    """The corpus, its tokens and its samples."""

    files: list[str] = Field([])
    """UTF-8 text files: paths and globs (``**`` searches subdirectories), relative to the working
    directory; read in sorted order, each once. Empty for the reference text of CPython
    (pydoc_data.topics), which differs slightly between Python versions."""

    document_separator: str | None = Field(None, min_length=1)
    """Text that separates the documents within a file; not part of them. null: one document per
    file."""

    tokenizer: str = Field("bytes", min_length=1)
    """``bytes``, or the path of a tokenizer.json of Hugging Face ``tokenizers``."""

    end_of_document: str | None = Field(None, min_length=1)
    """The tokenizer's token that ends a document, such as <|endoftext|>; null adds a new id after
    the tokenizer's. Ignored with ``bytes``, whose end of document is id 256."""

    validation: Ratio | Count = 0.1
    """Documents for validation: a ratio of all documents (at least one document) or a number."""

    split_seed: int = 0
    """Seed of the choice of validation documents, independent of the run's seed."""

    context: int = Field(256, ge=1)
    """Tokens per sample."""

    pack: bool = True
    """Split the concatenated documents into samples, so that only the last sample is padded; false
    splits each document separately and pads its last sample."""

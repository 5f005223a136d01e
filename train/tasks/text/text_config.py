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
    """How the generated text begins."""

    sample_tokens: int = non_semantic(300, ge=0)
    """How many tokens to generate; 0 for no text."""

    sample_temperature: float = non_semantic(0.8, ge=0.0)
    """Divides the logits before the softmax; 0 always takes the most probable token."""

    sample_top_k: int | None = non_semantic(None, ge=1)
    """Draw from this many most probable tokens only; null for all."""

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
    """Base of the wavelengths of rotary positions."""

    context: int | None = Field(None, ge=1)
    """Rows in the table of learned positions, so the longest input; null for ``data.context``."""

    tied: bool = True
    """Share the head's weight with the token embedding (Press and Wolf, 2017)."""

    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Probability of dropping an embedding, an attention weight or an output of a sublayer."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError(
                f"model.width ({self.width}) must be a multiple of model.heads ({self.heads}), "
                "because each head takes an equal part of it."
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
    directory; read in sorted order, each once. Empty for the reference text that CPython ships
    (pydoc_data.topics), which differs a little between Python versions."""

    document_separator: str | None = Field(None, min_length=1)
    """Text that separates the documents within a file, itself dropped; null where each file is
    one document."""

    tokenizer: str = Field("bytes", min_length=1)
    """``bytes``, or the path of a tokenizer.json of Hugging Face ``tokenizers``."""

    end_of_document: str | None = Field(None, min_length=1)
    """The token of that tokenizer which ends a document, such as <|endoftext|>; null adds a new
    id for it after the tokenizer's own. Not used with ``bytes``, whose end of document is 256."""

    validation: Ratio | Count = 0.1
    """Documents kept for validation: a ratio of them (at least one) or their number."""

    split_seed: int = 0
    """Seed of the choice of validation documents, apart from the run's seed."""

    context: int = Field(256, ge=1)
    """Tokens in a sample."""

    pack: bool = True
    """Cut the concatenated documents into samples, so that only the very last one is padded;
    false cuts each document on its own and pads its last sample."""

"""A decoder-only transformer."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from train.tasks.text.text_config import Model


class Transformer(nn.Module):
    """A decoder-only transformer (Vaswani et al., 2017, "Attention is all you need"; decoder only
    as in Radford et al., 2018).

    Blocks are pre-norm (Xiong et al., 2020, "On layer normalization in the transformer
    architecture"); linear layers have no bias. Weights are drawn from N(0, 0.02), those of output
    projections into the residual stream from N(0, 0.02 / sqrt(2 * layers)), so that its variance
    does not grow with depth (Radford et al., 2019, GPT-2).

    ``vocabulary`` is the number of token ids; ``context`` is the maximum input length, used by
    learned positions only.
    """

    def __init__(self, config: Model, vocabulary: int, context: int) -> None:
        super().__init__()
        self.head_dim = config.width // config.heads
        self.rotary_base = config.rotary_base
        self.embedding = nn.Embedding(vocabulary, config.width)
        learned = config.positions == "learned"
        self.positions = nn.Embedding(context, config.width) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers))
        if config.tied:
            # Press and Wolf, 2017, "Using the output embedding to improve language models".
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, vocabulary) float32 of the token after each of tokens (B, T) int64."""
        x = self.embedding(tokens)
        rotation = None
        if self.positions is None:
            rotation = rotary_angles(tokens.shape[1], self.head_dim, self.rotary_base, x.device)
        else:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotation)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits.float()

    def flops_per_token(self, context: int) -> int:
        """FLOPs of the forward and backward pass of one token in a sequence of ``context`` tokens.

        6N + 12 * layers * width * context (Chowdhery et al., 2022, "PaLM", appendix B). N is the
        number of weights in linear layers, the head included even if it is tied to the embedding.
        """
        multiplied = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        width = self.embedding.embedding_dim
        return 6 * multiplied + 12 * len(self.blocks) * width * context


class Block(nn.Module):
    """Attention, then MLP, each on the normalised residual stream and added to it."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = GELU(config) if config.mlp == "gelu" else SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """x (B, T, width) to the same shape; rotation from :func:`rotary_angles` or None."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation))
        y: torch.Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return y


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al., 2017)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """x (B, T, width) to the same shape; position t attends to positions 0..t."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, head_dim)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        dropout = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        projected: torch.Tensor = self.out(y.transpose(1, 2).reshape(batch, length, width))
        return projected


class GELU(nn.Module):
    """A hidden layer with GELU (Hendrycks and Gimpel, 2016)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        hidden = config.hidden or 4 * config.width
        self.up = nn.Linear(config.width, hidden, bias=False)
        self.down = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, width) to the same shape."""
        y: torch.Tensor = self.down(F.gelu(self.up(x)))
        return y


class SwiGLU(nn.Module):
    """A hidden layer gated by SiLU (Shazeer, 2020, "GLU variants improve transformer")."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        hidden = config.hidden or -(-8 * config.width // 3 // 8) * 8
        self.gate = nn.Linear(config.width, hidden, bias=False)
        self.up = nn.Linear(config.width, hidden, bias=False)
        self.down = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, width) to the same shape."""
        y: torch.Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


def make_norm(config: Model) -> nn.Module:
    """RMSNorm (Zhang and Sennrich, 2019) or LayerNorm (Ba et al., 2016) over the width."""
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.width, eps=1e-5)


def rotary_angles(
    length: int, head_dim: int, base: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, each (length, head_dim / 2) float32, of the rotation angles of position t
    and pair i: t * base ** (-2i / head_dim) (Su et al., 2021, "RoFormer")."""
    pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    frequencies = base ** (-pairs / head_dim)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (x_i, x_{i + head_dim/2}) of x (B, heads, T, head_dim), in float32."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.type_as(x)

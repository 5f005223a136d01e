"""Models with odd parts, as people's models have them, in any combination."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from tests.support.tiny import Noisy, TinyTask
from train import Ratio, Section

WIDTH = 24


class Frozen(nn.Linear):
    """A layer that does not train; ``dtype`` is that of its weight."""

    def __init__(self, dtype=torch.float32):
        super().__init__(WIDTH, WIDTH)
        self.weight.data = self.weight.data.to(dtype)
        self.requires_grad_(False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class PartlyFrozen(nn.Linear):
    """A frozen weight with a bias that trains."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.weight.requires_grad_(False)


class Adapted(nn.Module):
    """A frozen layer and a low-rank update of it (LoRA)."""

    def __init__(self):
        super().__init__()
        self.base = Frozen()
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x))


class Scalar(nn.Module):
    """A parameter without dimensions, such as a logit scale."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x * self.scale


class Empty(nn.Module):
    """A parameter without elements: a prompt of length 0."""

    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(0, WIDTH))

    def forward(self, x):
        return x + torch.cat([self.prompt, x.new_zeros(1, WIDTH)]).sum(0)


class Transposed(nn.Module):
    """A parameter that is not contiguous."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(WIDTH + 1, WIDTH).t())

    def forward(self, x):
        return (x @ self.weight)[:, :WIDTH]


class ChannelsLast(nn.Module):
    """A convolution whose weight is laid out with the channels last."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1).to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.conv(x.view(-1, 2, 3, 4)).flatten(1)


class Constants(nn.Module):
    """Buffers of many dtypes, frozen parameters that are complex and integer, and a buffer that is
    not stored."""

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.randperm(WIDTH))
        self.register_buffer("turn", torch.polar(torch.ones(WIDTH // 2), torch.rand(WIDTH // 2)))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("short", torch.randn(WIDTH).bfloat16())
        self.register_buffer("long_", torch.rand(WIDTH).double())
        self.register_buffer("passing", torch.ones(WIDTH), persistent=False)
        phase = torch.polar(torch.ones(WIDTH // 2), torch.rand(WIDTH // 2))
        self.phase = nn.Parameter(phase, False)
        self.codes = nn.Parameter(torch.randint(-3, 3, (WIDTH,), dtype=torch.int8), False)

    def forward(self, x):
        turned = (
            torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2).contiguous())
            * self.turn
            * self.phase
        )
        x = torch.view_as_real(turned).flatten(-2)[..., self.order].to(x.dtype)
        return x * self.passing + self.short.to(x.dtype) * self.codes + self.long_.to(x.dtype)


class SharedBuffer(nn.Module):
    """A buffer that two modules have in common."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Module(), nn.Module()
        self.one.register_buffer("table", torch.randn(WIDTH))
        self.two.register_buffer("table", self.one.table)

    def forward(self, x):
        return x * self.one.table + self.two.table


class Around(nn.Module):
    """Another module below the name ``inner``."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Recurrent(nn.Module):
    """An LSTM over a sequence of three."""

    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(WIDTH // 3, WIDTH // 3, batch_first=True)

    def forward(self, x):
        return self.cells(x.view(-1, 3, WIDTH // 3))[0].flatten(1)


class Looped(nn.Module):
    """A layer that is used several times in a forward pass."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x)))


class Complex(nn.Module):
    """A filter in the frequency domain, whose weight is complex."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(0.3 * torch.randn(WIDTH // 2 + 1, dtype=torch.complex64))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x.float()) * self.filter, n=WIDTH)


class Sparse(nn.Module):
    """A table of vectors with sparse gradients."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, WIDTH, sparse=True)

    def forward(self, x):
        return x + self.table((x.detach().sum(-1).abs() * 10).long() % 10)


class SparseFunction(nn.Module):
    """A sparse gradient that no module shows."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, WIDTH))

    def forward(self, x):
        rows = (x.detach().sum(-1).abs() * 10).long() % 10
        return x + nn.functional.embedding(rows, self.table, sparse=True)


class BatchNormed(nn.Module):
    """A layer that normalises by a micro-batch, and keeps statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return self.norm(x)


class MaskedGradient(nn.Linear):
    """Some rows of the weight do not train, which a hook of the parameter sees to."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.weight.register_hook(lambda gradient: gradient * (torch.arange(WIDTH) % 2))


class SharedMemory(nn.Module):
    """Two parameters tied by their memory, one transposed."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.two.weight.data = self.one.weight.data.t()

    def forward(self, x):
        return self.two(self.one(x))


class Expanded(nn.Module):
    """A parameter whose elements have one place in memory."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1).expand(WIDTH))

    def forward(self, x):
        return x * self.scale


class MaxNorm(nn.Module):
    """A table whose vectors are shortened where they are used."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, WIDTH, max_norm=1.0)

    def forward(self, x):
        return x + self.table((x.detach().sum(-1).abs() * 10).long() % 10)


class Teacher(nn.Module):
    """A frozen copy of a layer, the moving average of its weights, that each forward pass moves."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.teacher.requires_grad_(False)

    def forward(self, x):
        if self.training:
            self.teacher.weight.data.lerp_(self.student.weight.data, 0.1)
        return self.student(x) + self.teacher(x)


class Encoder(nn.Module):
    """Two layers of torch's encoder, with a mask for the padding."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        x = x.view(-1, 3, 8)
        padded = torch.arange(3).eq(2).expand(len(x), 3)
        return self.layers(x, src_key_padding_mask=padded).flatten(1)


PARTS = {
    "frozen": Frozen,
    "frozen-bf16": lambda: Frozen(torch.bfloat16),
    "frozen-fp64": lambda: Frozen(torch.float64),
    "partly-frozen": PartlyFrozen,
    "adapted": Adapted,
    "tied": Tied,
    "scalar": Scalar,
    "empty": Empty,
    "transposed": Transposed,
    "channels-last": ChannelsLast,
    "constants": Constants,
    "shared-buffer": SharedBuffer,
    "normed": lambda: Around(weight_norm(nn.Linear(WIDTH, WIDTH))),
    "recurrent": Recurrent,
    "looped": Looped,
    "orthogonal": lambda: Around(orthogonal(nn.Linear(WIDTH, WIDTH))),
    "masked-gradient": MaskedGradient,
}
# The same on placements that divide steps alike.
OF_MICRO_BATCHES = {
    "batch-normed": BatchNormed,
    "spectral": lambda: Around(spectral_norm(nn.Linear(WIDTH, WIDTH))),
}
# The gradient of attention's key bias is rounding alone, which Adam scales up.
OF_ROUNDING = {"encoder": Encoder}
# No strategy that shards parameters can train these.
REFUSED = {
    "complex": Complex,
    "sparse": Sparse,
    "sparse-function": SparseFunction,
    "lazy": lambda: Around(nn.LazyLinear(WIDTH)),
    "shared-memory": SharedMemory,
    "expanded": Expanded,
    "max-norm": MaxNorm,
    "teacher": Teacher,
}


class OddModel(nn.Module):
    """Residual layers between two linear ones."""

    def __init__(self, parts):
        super().__init__()
        self.first, self.last = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.parts = nn.ModuleList(
            {**PARTS, **OF_MICRO_BATCHES, **OF_ROUNDING, **REFUSED}[part]() for part in parts
        )

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for part in self.parts:
            x = x + 0.3 * torch.tanh(part(x))
        return self.last(x)


class OddTask(TinyTask):
    """The tiny task with such a model."""

    class Model(Section):
        parts: list[str] = []
        """Names of parts."""
        passes: int = 1
        """Forward passes per loss."""

    def build_model(self):
        return OddModel(self.config.model.parts)

    def train_dataset(self):
        return Noisy(61, augment=True)

    def loss(self, model, batch):
        if model.training:
            self.misbehave()
        passes = [model(batch["x"] * (1 - 0.1 * n)) for n in range(self.config.model.passes)]
        errors = sum((p - batch["y"]).square() for p in passes) * batch["mask"]
        return Ratio(errors.sum(), batch["mask"].sum())

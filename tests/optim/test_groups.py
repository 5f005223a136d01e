"""Parameter groups by name, layer-wise decay, and the kinds of parameters."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from train.exits import UsageError
from train.optim.groups import parameter_kinds, parameter_settings
from train.optim.optim_config import OptimConfig
from train.optim.optimizer import build_optimizer, set_learning_rate


class Scale(nn.Module):
    """A gain whose class is not called a norm, a learnt temperature, and a matrix."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.mix = nn.Parameter(torch.ones(4, 4))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(11))
        self.scale = Scale()
        self.head = nn.Linear(4, 10)
        self.tied = nn.Linear(4, 10, bias=False)
        self.tied.weight = self.embedding.weight
        self.blocks[9].requires_grad_(False)


def settings(*groups, **values):
    """Learning rate, weight decay and further arguments of each parameter, by name."""
    config = OptimConfig(lr=0.1, weight_decay=0.5, groups=list(groups), **values)
    model = Model()
    optimizer = build_optimizer(config, model, parameter_settings(config, model, model.blocks))
    set_learning_rate(optimizer, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def changed(key, *groups, **values):
    """The values of ``key`` that differ from those without groups, by parameter."""
    plain, found = settings(), settings(*groups, **values)
    assert plain.keys() == found.keys()
    return {name: g[key] for name, g in found.items() if g[key] != plain[name][key]}


def test_vectors_and_scalars_do_not_decay_whatever_their_module_is_called():
    found = settings()
    no_decay = {name for name, group in found.items() if group["weight_decay"] == 0.0}
    assert {"scale.gain", "scale.temperature", "embedding.weight", "head.bias"} <= no_decay
    assert {"scale.mix", "head.weight", "blocks.0.weight"}.isdisjoint(no_decay)


class NormalisedLinear(nn.Linear):
    """A linear layer, whatever its name."""


def test_kinds_go_by_role_and_shape():
    model = nn.ModuleDict(
        {
            "linear": NormalisedLinear(4, 1),
            "norm": nn.LayerNorm((2, 3)),
            "rnn": nn.GRU(2, 3),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "own": nn.ParameterDict(
                {
                    "token": torch.ones(1, 1, 4),
                    "scale": torch.ones(4, 1, 1),
                    "mix": torch.ones(2, 2),
                }
            ),
        }
    )
    kinds = parameter_kinds(model)
    expected = {
        "linear.weight": "weight", "linear.bias": "bias", "norm.weight": "norm", "rnn.weight_ih_l0": "weight",
        "rnn.bias_ih_l0": "bias", "attention.bias_k": "bias", "attention.in_proj_weight": "weight",
        "own.token": "norm", "own.scale": "norm", "own.mix": "weight",
    }  # fmt: skip
    assert {name: kinds[name] for name in expected} == expected


def test_a_group_whose_parameters_all_belong_to_earlier_ones_is_refused():
    groups = [{"pattern": "head", "lr": 0.1}, {"pattern": "head.bias", "lr": 0.2}]
    with pytest.raises(
        UsageError, match=r"optim\.groups\.1\.pattern is 'head.bias'.*move it before"
    ):
        parameter_settings(OptimConfig(groups=groups), Model())


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("head", {"head.weight", "head.bias"}),
        ("head.*", {"head.weight", "head.bias"}),
        ("head.bias", {"head.bias"}),
        ("blocks.1", {"blocks.1.weight", "blocks.1.bias"}),
        ("blocks.[01].*", {f"blocks.{n}.{leaf}" for n in (0, 1) for leaf in ("weight", "bias")}),
        (r"^blocks\.(1|10)\.weight$", {"blocks.1.weight", "blocks.10.weight"}),
        (".*mix", {"scale.mix"}),
        ("gain", {"scale.gain"}),
        ("tied", {"embedding.weight"}),  # by any of the names of a shared parameter
    ],
)
def test_a_pattern_selects_by_name(pattern, names):
    assert changed("lr", {"pattern": pattern, "lr": 0.3}) == dict.fromkeys(
        names, pytest.approx(0.3)
    )


def test_the_first_matching_group_decides():
    groups = {"pattern": "*.bias", "weight_decay": 0.25}, {"pattern": "head", "lr_factor": 0.5}
    assert changed("lr", *groups) == {"head.weight": pytest.approx(0.05)}
    decay = changed("weight_decay", *groups)
    assert decay == dict.fromkeys([n for n in settings() if n.endswith("bias")], 0.25)


def test_a_group_sets_arguments_of_the_optimiser():
    found = settings({"pattern": "head", "betas": [0.5, 0.75], "eps": 0.01})
    assert (found["head.bias"]["betas"], found["head.bias"]["eps"]) == ((0.5, 0.75), 0.01)
    assert found["scale.mix"]["betas"] == (0.9, 0.999)


def test_layer_wise_decay_counts_from_the_last_block():
    rates = {name: group["lr"] for name, group in settings(layer_decay=0.5).items()}
    assert rates["head.weight"] == rates["scale.gain"] == 0.1
    assert rates["blocks.10.weight"] == rates["blocks.10.bias"] == pytest.approx(0.05)
    assert rates["blocks.0.weight"] == pytest.approx(0.1 * 0.5**11)
    assert rates["embedding.weight"] == pytest.approx(0.1 * 0.5**12)


def test_layer_wise_decay_multiplies_the_rate_of_a_group():
    found = settings({"pattern": "blocks.10", "lr": 0.2}, layer_decay=0.5)
    assert found["blocks.10.weight"]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("group", "text"),
    [
        ({"pattern": "haed"}, "no setting"),
        ({"pattern": "", "lr": 0.1}, "pattern"),
        ({"pattern": "(", "lr": 0.1}, "no regular expression"),
        ({"pattern": "head", "lr": 0.1, "lr_factor": 1.0}, "both lr and lr_factor"),
        ({"pattern": "head", "lr": -0.1}, "greater than or equal to 0"),
    ],
)
def test_an_invalid_group_is_refused(group, text):
    with pytest.raises(ValidationError, match=text):
        OptimConfig(groups=[group])


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("haed.weight", r"optim\.groups\.0\.pattern is 'haed.weight' \(line 3\).*head\.weight\?"),
        ("blocks.9.*", "matches no trainable parameter"),  # frozen
    ],
)
def test_a_pattern_without_parameters_is_refused(pattern, text):
    config = OptimConfig(groups=[{"pattern": pattern, "lr": 0.1}])
    with pytest.raises(UsageError, match=text):
        parameter_settings(config, Model(), origin="line 3")


def test_an_argument_that_the_optimiser_lacks_is_refused():
    config = OptimConfig(use="sgd", groups=[{"pattern": "*", "eps": 0.1}])
    with pytest.raises(UsageError, match=r"optim\.groups\.0\.eps is not an argument of.*'sgd'"):
        build_optimizer(config, Model(), origin="line 3")


class Two(torch.optim.SGD):
    """One for each half of the parameters, as for a GAN."""

    def __new__(cls, groups, lr=0.1):
        return torch.optim.SGD(groups, lr), torch.optim.SGD(groups, lr)


def test_an_optimiser_class_that_returns_several_is_refused():
    config = OptimConfig(use=f"{__name__}:Two")
    with pytest.raises(UsageError, match=r"returns a tuple when it is called, but a run has one"):
        build_optimizer(config, Model(), origin="line 3")


def test_layer_wise_decay_without_blocks_is_refused():
    with pytest.raises(UsageError, match=r"optim\.layer_decay is set.*no blocks"):
        parameter_settings(OptimConfig(layer_decay=0.5), nn.Linear(2, 2))

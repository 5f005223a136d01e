"""The optimiser's class, parameters and weight decay."""

import pytest
import torch
from torch import nn

from train.exits import UsageError
from train.optim.groups import parameter_settings
from train.optim.optim_config import OptimConfig
from train.optim.optimizer import build_optimizer, set_learning_rate


class MyRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class Annotated(torch.optim.SGD):
    """Its arguments have all kinds of annotations."""

    def __init__(
        self, params, lr, weight_decay: "float" = 0.0, name: "str" = "",
        number: int = None, anything=1, unknown: "NotDefined" = None,  # noqa: F821, RUF013
    ):  # fmt: skip
        super().__init__(params, lr, weight_decay=weight_decay)


class ScheduleFree(torch.optim.SGD):
    """Has other weights for an evaluation than for a step."""

    def train(self):
        pass

    def eval(self):
        pass


def model():
    module = nn.ModuleDict(
        {
            "embedding": nn.Embedding(10, 4),
            "linear": nn.Linear(4, 4),
            "norm": MyRMSNorm(),
            "conv": nn.Conv1d(4, 4, 3),
            "head": nn.Linear(4, 10, bias=False),
            "frozen": nn.Linear(4, 4),
        }
    )
    module["head"].weight = module["embedding"].weight
    module["frozen"].requires_grad_(False)
    return module


def decayed(config, module):
    """Names with weight decay, and names without."""
    names = {id(p): name for name, p in module.named_parameters()}
    found = {True: set(), False: set()}
    for group in build_optimizer(config, module, parameter_settings(config, module)).param_groups:
        found[group["weight_decay"] > 0] |= {names[id(p)] for p in group["params"]}
    return found[True], found[False]


def test_norms_biases_and_embeddings_do_not_decay():
    decay, none = decayed(OptimConfig(weight_decay=0.1), model())
    assert decay == {"linear.weight", "conv.weight"}
    assert none == {"embedding.weight", "linear.bias", "norm.scale", "conv.bias"}


def test_no_decay_selects_the_kinds():
    decay, none = decayed(OptimConfig(weight_decay=0.1, no_decay=["norm"]), model())
    assert none == {"norm.scale"}
    assert "embedding.weight" in decay


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(UsageError, match="no trainable parameter"):
        build_optimizer(OptimConfig(), nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(
    ("use", "cls"),
    [
        ("adamw", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("torch.optim:NAdam", torch.optim.NAdam),
    ],
)
def test_an_optimiser_is_found_by_name_or_dotted_path(use, cls):
    optimizer = build_optimizer(OptimConfig(use=use, lr=0.5), model())
    assert type(optimizer) is cls
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_arguments_arrive_and_the_fused_kernels_are_used():
    config = OptimConfig(betas=[0.8, 0.95], eps=1e-6, options={"amsgrad": True})
    defaults = build_optimizer(config, model()).defaults
    assert (defaults["betas"], defaults["eps"], defaults["amsgrad"]) == ((0.8, 0.95), 1e-6, True)
    assert defaults["fused"] is True
    assert (
        build_optimizer(OptimConfig(options={"foreach": True}), model()).defaults["fused"] is None
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"use": "torch.optim:AdamV"}, r"optim\.use \(line 3\).*AdamV"),
        ({"use": "torch.nn:Linear"}, r"Linear.*Optimizer"),
        ({"use": "sgd", "betas": [0.9, 0.99]}, r"optim\.betas is not an argument of.*'sgd'"),
        ({"options": {"amsgrd": True}}, r"optim\.options\.amsgrd is not an argument"),
        ({"use": "sgd", "options": {"nesterov": True}}, r"rejects its arguments: Nesterov"),
        (
            {
                "groups": [
                    {"pattern": "linear", "lr": 1.0},
                    {"pattern": "conv", "betas": [2.0, 3.0]},
                ]
            },
            r"rejects betas of optim.groups.1: Invalid beta parameter at index 0: 2.0\.$",
        ),
        ({"options": {"lr": 2}}, r"optim\.options\.lr is 2, but optim\.lr decides it"),
        ({"options": {"weight_decay": 0.1}}, r"set optim\.weight_decay, and remove"),
        ({"options": {"amsgrad": []}}, r"optim\.options\.amsgrad is \[\].*valid boolean"),
        ({"options": {"fused": "yes"}}, r"optim\.options\.fused is 'yes'.*valid boolean"),
        ({"options": {"betas": [0.9, "b"]}}, r"optim\.options\.betas is .*valid number"),
        ({"options": {"betas": [0.9]}}, r"optim\.options\.betas is \[0\.9\]"),
        ({"use": "sgd", "options": {"dampening": "0.1"}}, r"dampening is '0\.1'.*valid number"),
        ({"use": f"{__name__}:Annotated", "options": {"name": 3}}, r"name is 3.*valid string"),
        ({"use": f"{__name__}:ScheduleFree"}, r"by its train\(\) and eval\(\).*ema\.decay"),
        ({"eps": 0.1, "options": {"eps": 0.2}}, r"optim\.options\.eps is 0\.2, but optim\.eps"),
    ],
)
def test_an_invalid_optimiser_is_one_sentence(values, text):
    with pytest.raises(UsageError, match=text) as error:
        build_optimizer(OptimConfig(**values), model(), origin="line 3")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("use", "options"),
    [
        ("adamw", {"betas": [0.9, 0.99], "eps": 1, "foreach": None, "fused": False}),
        ("adafactor", {"eps": [None, 0.01], "d": 2}),
        ("sgd", {"dampening": 0, "nesterov": False}),
        ("Annotated", {"name": "a", "number": None, "anything": ["b"], "unknown": "c"}),
    ],
)
def test_options_of_the_right_types_are_taken(use, options):
    use = f"{__name__}:{use}" if use == "Annotated" else use
    build_optimizer(OptimConfig(use=use, options=options), model())


def test_the_learning_rate_of_every_group_is_set():
    config, module = OptimConfig(weight_decay=0.1), model()
    optimizer = build_optimizer(config, module, parameter_settings(config, module))
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_state_in_parameter_groups_is_restored(tmp_path):
    from tests.support.forked import run
    from tests.support.runs import state

    base = ["optim.use=tests.faults.tasks:DistanceOptimizer", "checkpoint.every_steps=10"]
    base += ["checkpoint.keep_last=9"]
    run("fit", tmp_path / "one", *base)
    run("fit", tmp_path / "two", *base, "task.kill_at_step=25", expect=-9)
    run("fit", tmp_path / "two", *base)
    distance = state(tmp_path / "one")["optimizer_groups"][0]["distance"]
    assert distance > state(tmp_path / "one", 20)["optimizer_groups"][0]["distance"] > 0
    assert state(tmp_path / "two")["optimizer_groups"][0]["distance"] == distance

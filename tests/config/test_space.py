"""The space of a study is validated against the config in one clear sentence per mistake."""

import pytest

from train.config.load import load_config
from train.config.space import check_space, load_space, stored_space
from train.exits import UsageError

BASE = ["task.use=digits", "batch.global_batch_size=32", "length.steps=10"]
GOOD = """\
optim.momentum: {type: float, low: 0.5, high: 0.9, when: {optim.use: sgd}}
optim.use:
  type: categorical
  choices: [adamw, sgd]
model.channels: {type: int, low: 8, high: 24, step: 8}
ema: {type: categorical, choices: [null, {decay: 0.9}]}
"""


def space(tmp_path, text):
    file = tmp_path / "space.yaml"
    file.write_text(text)
    return load_space(str(file))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.lrr: {type: float, low: 0.1, high: 1}",
         "optim.lrr is not a known key (value 0.1, from FILE:1); did you mean optim.lr?"),
        ("\noptim.lr: {type: float, lwo: 1, high: 2}",
         "optim.lr.lwo is not a field of type: float (from FILE:2); did you mean low?"),
        ("optim.lr: {type: float, low: 1}", "optim.lr needs high (from FILE:1)"),
        ("optim.lr: {type: flaot, low: 1, high: 2}", "but is 'flaot' (from FILE:1); did you mean float?"),
        ("optim.lr: {low: 1, high: 2}", "optim.lr has no type (FILE:1); set type to one of float, int"),
        ("optim.lr:\n  type: float\n  low: a\n  high: 2",
         "optim.lr.low must be a number, but is 'a' (from FILE:3)."),
        ("optim.lr: {type: float, low: 1, high: .inf}", "optim.lr.high must be a finite number"),
        ("optim.lr: {type: float, low: -1, high: 2}",
         "optim.lr must be greater than 0.0, but is -1.0 (from FILE:1)."),
        ("optim.lr: {type: float, low: 3, high: 2}", "which is greater than high, 2.0; swap them."),
        ("optim.lr: {type: float, low: 0, high: 2, log: true}", "greater than 0 with log: true"),
        ("optim.lr: {type: float, low: 1, high: 2, log: true, step: 1}", "has both log and step"),
        ("model.channels: {type: int, low: 8, high: 30, step: 8}", "set it to 24, or change step."),
        ("model.channels: {type: float, low: 8, high: 16}", "must be a whole number, but is 8.0"),
        ("model.channels: {type: int, low: 8.5, high: 16}", "low must be a whole number"),
        ("optim.use: {type: categorical, choices: [adamw, sdg]}",
         "but is 'sdg' (from FILE:1); did you mean sgd?"),
        ("optim.use: {type: categorical, choices: []}", "a list of at least 1 item"),
        ("optim.use: {type: categorical, choices: [sgd, sgd]}", 'has "sgd" twice'),
        ("optim: {lr: {type: float, low: 1, high: 2}}", "write the keys of a space dotted, as `optim.lr: "),
        ("optim.lr: 3", "optim.lr is 3 (FILE:1), but must be a mapping with a type"),
        ("optim lr: {type: float, low: 1, high: 2}", "'optim lr' (FILE:1) is not a config key"),
        ("run.dir: {type: categorical, choices: [a]}", "run.dir (FILE:1) cannot be in the space"),
        ("", "FILE has no keys"),
        (GOOD.replace("when: {optim.use", "when: {optim.ues"), "did you mean optim.use?"),
        (GOOD.replace("when: {optim.use: sgd", "when: {optim.use: sdg"), 'did you mean "sgd"?'),
        ("optim.lr: {type: float, low: 1, high: 2}\noptim.eps: {type: float, low: 1, high: 2, "
         "when: {optim.lr: 1}}", "a range of floats without a step; only"),
        ("optim.use: {type: categorical, choices: [sgd], when: {run.seed: 1}}\n"
         "run.seed: {type: int, low: 1, high: 2, when: {optim.use: sgd}}", "in a circle"),
        ("optim.lr: {type: float, low: 1, high: 2}\noptim: {type: categorical, choices: [{lr: 1}]}",
         "optim.lr (FILE:1) is inside optim (FILE:2)"),
        ("batch.global_batch_size: {type: int, low: 1, high: 20}\n"
         "batch.micro_batch_size: {type: int, low: 8, high: 16, step: 8}", "batch.micro_batch_size is 8"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_with_its_place(tmp_path, text, expected):
    with pytest.raises(UsageError) as caught:
        check_space(space(tmp_path, text), [], BASE, 1)
    said = str(caught.value).replace(str(tmp_path / "space.yaml"), "FILE")
    assert expected in said
    assert "\n" not in said


def test_each_extreme_value_is_validated_with_what_several_ranks_need(tmp_path):
    found = space(tmp_path, "batch.global_batch_size: {type: int, low: 2, high: 8}\n")
    check_space(found, [], BASE, 2)
    with pytest.raises(UsageError, match="batch.global_batch_size is 2"):
        check_space(found, [], BASE, 4)


def test_a_large_space_is_validated_one_key_at_a_time(tmp_path):
    keys = ["lr", "weight_decay", "eps", "clip_norm", "momentum"]
    lines = [f"optim.{key}: {{type: float, low: 0.1, high: 0.9}}" for key in keys]
    lines += ["model.dropout: {type: float, low: 0.0, high: 1.0, when: {optim.use: sgd}}"]
    lines += ["optim.use: {type: categorical, choices: [adamw, adam, sgd]}"]
    with pytest.raises(UsageError, match=r"model\.dropout must be less than 1\.0"):
        check_space(space(tmp_path, "\n".join(lines)), [], BASE, 1)


def test_a_key_is_set_only_where_its_condition_holds(tmp_path):
    found = space(tmp_path, GOOD)
    extremes = found.extremes()
    assert len(extremes) == (1 + 2) * 2 * 2
    assert all(("optim.momentum" in each) == (each["optim.use"] == "sgd") for each in extremes)
    assert len(list(space(tmp_path, GOOD.replace("0.9,", "0.9, step: 0.2,")).grid())) == 4 * 3 * 2
    with pytest.raises(UsageError, match=r"optim\.momentum is a range of floats without a step"):
        found.grid()


def test_the_values_of_a_trial_are_those_of_its_config(tmp_path):
    found = space(tmp_path, GOOD)
    assigned = {"optim.use": "sgd", "optim.momentum": 1e-05, "model.channels": 16,
                "ema": {"decay": 0.9}}  # fmt: skip
    loaded = load_config([], [*BASE, *found.overrides(assigned)], runs=False)
    config = loaded.config
    assert (config.optim.use, config.optim.momentum) == ("sgd", 1e-05)
    assert (config.model.channels, config.ema.decay) == (16, 0.9)
    again = stored_space(found.values, "study.json")
    assert again.extremes() == found.extremes()

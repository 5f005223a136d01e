"""A model takes the weights that ``init_from`` names, and says what it does not take."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.support.strategies import single
from tests.support.weights import write_checkpoint
from train.checkpoint.checkpoint_config import MirrorConfig
from train.checkpoint.init_from_config import InitFromConfig
from train.checkpoint.mirror import Mirror
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.store import CheckpointStore
from train.checkpoint.weight_source import find_source
from train.config.changes import Difference
from train.exits import RetryError, UsageError
from train.optim.ema import Ema, EmaConfig
from train.setup.find_run import Attempt
from train.setup.init_from import (
    InitialWeights,
    _changed_since,
    changes_without_effect,
    load_initial_weights,
)


def placed(model):
    trainable = [p for p in model.parameters() if p.requires_grad]
    return single(model, lambda _: torch.optim.SGD(trainable))


def initial(directory, source, *, strict=True):
    return InitialWeights(
        InitFromConfig(source=str(source), strict=strict),
        find_source(str(source), directory, directory / "download", "init_from.source is 'x'"),
        "init_from.source is 'x'", directory / "download", [],
    )  # fmt: skip


def load(model, directory, source="weights.safetensors", *, strict=True, ema=None):
    return load_initial_weights(initial(directory, source, strict=strict), placed(model), ema)


def save(tmp_path, model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "weights.safetensors")


def model(seed, classes=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, classes))


def assert_same(one, other):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_parameters_and_buffers_are_loaded(tmp_path):
    source, target = model(0), model(1)
    source(torch.randn(6, 3))  # changes the running statistics
    save(tmp_path, source)
    loaded = load(target, tmp_path)
    assert_same(source, target)
    assert loaded.notes == []
    assert loaded.text.startswith("Initial weights: 9 of the 9 tensors of the model are loaded")
    assert (loaded.record["tensors"], loaded.record["step"]) == (9, None)


def test_the_average_of_weights_starts_from_the_loaded_ones(tmp_path):
    source, target = model(0), model(1)
    save(tmp_path, source)
    strategy = placed(target)
    ema = Ema(EmaConfig(), strategy)
    load_initial_weights(initial(tmp_path, "weights.safetensors"), strategy, ema)
    for name, shard in ema.averages.items():
        assert torch.equal(shard.local, source.get_parameter(name)), name


def test_the_record_names_the_checkpoint(tmp_path):
    write_checkpoint(tmp_path / "base", dict(model(0).state_dict()), step=30)
    loaded = load(model(1), tmp_path, "base")
    record = loaded.record
    assert (record["source"], record["step"], record["run"]) == ("base", 30, "r")
    assert len(record["sha256"]) == 64
    assert loaded.text.endswith("step-000000000030, step 30")


def test_the_record_names_the_url_of_a_copy_that_is_removed_once_it_is_loaded(tmp_path):
    write_checkpoint(tmp_path / "base", dict(model(0).state_dict()), step=30)
    url = f"file://{tmp_path}/mirror"
    store = CheckpointStore(tmp_path / "base/checkpoints")
    Mirror(MirrorConfig(url=url)).upload(store, 30, lambda: True)
    loaded = load(model(1), tmp_path, url)
    assert loaded.record["path"] == url
    assert loaded.text.endswith(f"from {url}, step 30")
    assert not (tmp_path / "download").exists()


def test_bf16_weights_are_loaded_into_fp32(tmp_path):
    source = model(0)
    save(tmp_path, source.bfloat16())
    target = model(1)
    load(target, tmp_path)
    assert target[0].weight.dtype == torch.float32
    assert torch.equal(target[0].weight, source[0].weight.float())


def test_another_head_is_refused_with_both_shapes_or_left_as_built(tmp_path):
    save(tmp_path, model(0, classes=10))
    target = model(1)
    with pytest.raises(UsageError) as refusal:
        load(target, tmp_path)
    text = str(refusal.value)
    assert text.startswith(
        "init_from.source is 'x', of which 7 of the 9 tensors of the model match:"
    )
    assert "2.weight (shape (10, 5) in the source, (4, 5) in the model)" in text
    assert text.endswith("or set init_from.strict=false to load only what matches.")
    assert_same(target, model(1))  # nothing is loaded from a source that is refused
    loaded = load(target, tmp_path, strict=False)
    assert torch.equal(target[0].weight, model(0)[0].weight)
    assert torch.equal(target[2].weight, model(1)[2].weight)
    [note] = loaded.notes
    assert "7 of the 9 tensors of the model are loaded" in note
    assert "other shape or dtype (2): 2.weight" in note


class Adapted(nn.Module):
    """A frozen base with a low-rank update and a new head."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(3, 5).requires_grad_(False)
        self.down, self.up = nn.Linear(3, 1, bias=False), nn.Linear(1, 5, bias=False)
        self.head = nn.Linear(5, 2)


def test_a_frozen_base_is_loaded_below_a_new_head(tmp_path):
    torch.manual_seed(0)
    source = nn.ModuleDict({"base": nn.Linear(3, 5), "old": nn.Linear(2, 2)})
    save(tmp_path, source)
    target = Adapted()
    up = target.up.weight.clone()
    [note] = load(target, tmp_path, strict=False).notes
    assert torch.equal(target.base.weight, source["base"].weight)
    assert not target.base.weight.requires_grad
    assert torch.equal(target.up.weight, up)
    assert "missing in the source (4): down.weight, up.weight, head.weight, head.bias" in note
    assert "unexpected in the source (2): old." in note


@pytest.mark.parametrize("strict", [True, False])
def test_a_source_of_another_model_is_refused(tmp_path, strict):
    save(tmp_path, nn.ModuleDict({"decoder": nn.Linear(7, 7)}))
    with pytest.raises(UsageError) as refusal:
        load(model(0), tmp_path, strict=strict)
    text = str(refusal.value)
    assert "0 of the 9 tensors of the model match" in text
    assert "unexpected in the source (2): decoder." in text
    assert text.endswith("\nName the weights of this model.")


def test_a_prefix_is_suggested(tmp_path):
    save(tmp_path, nn.ModuleDict({"module": model(0)}))
    with pytest.raises(UsageError, match="9 more would match without the prefix 'module.'"):
        load(model(1), tmp_path, strict=False)


class Tied(nn.Module):
    def __init__(self, *, tied=True):
        super().__init__()
        self.embed, self.a_head = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False)
        if tied:
            self.a_head.weight = self.embed.weight


def test_a_tied_tensor_is_loaded_under_either_name(tmp_path):
    weight = torch.randn(6, 3)
    for name in ("embed.weight", "a_head.weight"):
        save_file({name: weight}, tmp_path / "weights.safetensors")
        target = Tied()
        assert load(target, tmp_path).notes == []
        assert torch.equal(target.embed.weight, weight)
        assert target.a_head.weight is target.embed.weight


def test_one_tensor_cannot_take_two(tmp_path):
    source = Tied(tied=False)
    save(tmp_path, source)
    with pytest.raises(UsageError, match="other values for a_head.weight than for embed.weight"):
        load(Tied(), tmp_path)
    target = Tied()
    [note] = load(target, tmp_path, strict=False).notes
    assert "a_head.weight in" in note
    assert torch.equal(target.embed.weight, source.embed.weight)
    source.a_head.weight = source.embed.weight
    save(tmp_path, source)
    assert load(Tied(), tmp_path).notes == []


class Late(nn.Module):
    """Buffers that the first forward pass makes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("seen", None)
        self.register_buffer("found", torch.zeros(0))
        self.register_buffer("passing", torch.ones(2), persistent=False)


def test_buffers_that_the_model_makes_later_are_loaded(tmp_path):
    source = Late()
    source.seen, source.found = torch.arange(3), torch.randn(4, 2)
    save(tmp_path, source)
    target = Late()
    assert load(target, tmp_path).notes == []
    assert torch.equal(target.seen, source.seen)
    assert torch.equal(target.found, source.found)
    assert torch.equal(target.passing, torch.ones(2))


def test_extra_state_is_not_loaded_and_this_is_reported(tmp_path):
    tensors = dict(model(0).state_dict())
    write_checkpoint(tmp_path / "base", tensors, extra_state={"2": 1})
    [note] = load(model(1), tmp_path, "base").notes
    assert "has extra state (get_extra_state)" in note


def test_a_file_that_is_removed_after_its_check_is_worth_a_retry(tmp_path):
    save(tmp_path, model(0))
    found = initial(tmp_path, "weights.safetensors")
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(RetryError, match="was valid a moment ago"):
        load_initial_weights(found, placed(model(1)), None)


def test_a_source_that_changed_between_two_attempts_is_reported(tmp_path):
    save(tmp_path, model(0))
    directory = RunDirectory(tmp_path)
    first = initial(tmp_path, "weights.safetensors")
    record = load_initial_weights(first, placed(model(1)), None).record
    directory.attempts.record({"attempt": 1, "init_from": record})
    directory.attempts.record({"attempt": 2})
    assert _changed_since(directory, "weights.safetensors", first.source) is None
    save(tmp_path, model(2))
    second = initial(tmp_path, "weights.safetensors").source
    assert "has changed since an earlier attempt" in _changed_since(
        directory, "weights.safetensors", second
    )
    assert _changed_since(directory, "another", second) is None


def test_another_source_has_no_effect_on_a_run_that_resumes():
    change = Difference("init_from.source", "a", "b", changes_results=True)
    strict = Difference("init_from.strict", True, False, changes_results=False)

    def notes(step, *changes):
        return changes_without_effect(Attempt(None, 2, step, [], list(changes)))

    assert "which has no effect" in notes(5, change)[0]
    assert notes(None, change) == notes(5, strict) == notes(5) == []

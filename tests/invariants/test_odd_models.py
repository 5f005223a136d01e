"""I1 to I3 for models with odd parts: frozen, tied, empty, without dimensions, of other dtypes."""

import json
import random
import shutil

import pytest
import torch

import train
from tests.support.forked import run, run_ranks
from tests.support.hf import FAMILIES, HuggingFaceTask
from tests.support.lanes import thinned
from tests.support.odd import OF_MICRO_BATCHES, PARTS, REFUSED
from tests.support.runs import checkpoints, curve, tensors
from train.data.ledger import read_steps
from train.parity.compare import largest_difference

BASE = [
    "task.use=tests.support.odd:OddTask", "batch.micro_batch_size=3", "length.steps=6",
    "checkpoint.every_steps=3", "checkpoint.keep_last=9", "evaluate.every_steps=3",
    "optim.weight_decay=0.1",
]  # fmt: skip
ALL_SHARDED = "zero.param_persistence_threshold=0"
PLACEMENTS = {
    "2 ddp": (2, "strategy=ddp"),
    "2 fsdp2": (2, "strategy=fsdp2"),
    "2 zero1": (2, "strategy=zero1"),
    "2 zero2": (2, "strategy=zero2"),
    "2 zero3": (2, "strategy=zero3"),
    "2 zero3, all sharded": (2, "strategy=zero3", ALL_SHARDED),
    "3 fsdp2": (3, "strategy=fsdp2"),
    "3 zero3, all sharded": (3, "strategy=zero3", ALL_SHARDED),
}
REFUSALS = {
    "complex": "parameter parts.1.filter is complex (torch.complex64)",
    "sparse": "gradient of parts.1.table.weight is sparse",
    "sparse-function": "gradient of a parameter of the shape (10, 24) is sparse",
    "lazy": "the lazy module parts.1.inner (LazyLinear) has no shape yet",
    "shared-memory": "parameter parts.1.one.weight shares memory with parts.1.two.weight",
    "expanded": "elements of the parameter parts.1.scale share memory",
    "max-norm": "parts.1.table (Embedding) has max_norm",
    "teacher": "forward pass changed the values of the parameters parts.1.teacher.weight",
}
assert REFUSALS.keys() == REFUSED.keys()
NAMES = list(PARTS)
BY_MICRO_BATCH = " ".join([*OF_MICRO_BATCHES, "recurrent"])
# Each part once; then combinations that nobody has chosen.
MODELS = [" ".join(NAMES[n::3]) for n in range(3)]
MODELS += [" ".join(random.Random(seed).sample(NAMES, 5)) for seed in range(5)]


def settings(model):
    """``model``: names of parts; ``2x`` in front for two forward passes per loss; or ``hf`` and
    the name of a Hugging Face model."""
    if model.startswith("hf "):
        pytest.importorskip("transformers")
        use = f"task.use={HuggingFaceTask.__module__}:HuggingFaceTask"
        # The gradient of attention's key bias is rounding alone, which Adam would scale up.
        return [use, f"model.family={model[3:]}", "optim.eps=1e-3"]
    twice, parts = model.startswith("2x"), model.removeprefix("2x").split()
    return [f"model.parts=[{', '.join(parts)}]", *(["model.passes=2"] if twice else [])]


def fit(directory, model, placement):
    options = [*BASE, *settings(model)]
    if placement == "1":
        return run("fit", directory, *options)
    ranks, *strategy = PLACEMENTS[placement]
    return run_ranks(ranks, "fit", directory, *options, *strategy)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns a function that gives the run of a model on a placement; each runs once."""
    made = {}

    def of(model, placement):
        if (model, placement) not in made:
            made[model, placement] = tmp_path_factory.mktemp("run")
            fit(made[model, placement], model, placement)
        return made[model, placement]

    return of


def assert_same_run(one, other):
    assert read_steps(one / "ledger.bin") == read_steps(other / "ledger.bin")
    for key in ("train/loss", "train/gradient_norm", "eval/loss"):
        assert largest_difference(curve(one, key), curve(other, key)) <= 1e-5, key
    expected, found = tensors(one), tensors(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


HF_MODELS = [f"hf {family}" for family in FAMILIES]
# The first models on every placement, the others on some.
PAIRS = [(model, placement) for model in MODELS[:3] for placement in PLACEMENTS]
PAIRS += [
    (model, placement)
    for n, model in enumerate([*MODELS[3:], "2x frozen looped"])
    for placement in list(PLACEMENTS)[n % 3 :: 3]
]
# Dropout's masks are those of micro-batches, which three ranks cannot divide alike.
PAIRS += [
    (model, placement)
    for n, model in enumerate(HF_MODELS)
    for placement in list(PLACEMENTS)[n % 3 : 6 : 3]
]
# Each of the first models on a third of the placements.
IN_TEST = [
    (MODELS[n % 3], placement)
    for n, placement in enumerate(p for p in PLACEMENTS if p.startswith("2"))
]
PAIRS += [("hf gpt2", "2 fsdp2"), ("hf t5", "2 zero3, all sharded")]
PAIRS = list(dict.fromkeys([*PAIRS, *IN_TEST]))


@pytest.mark.parametrize(("model", "placement"), thinned(PAIRS, kept=IN_TEST[1:5]))
def test_every_placement_gives_the_same_run(finished, model, placement):
    assert_same_run(finished(model, "1"), finished(model, placement))


@pytest.mark.parametrize("placement", thinned(list(PLACEMENTS)[1:6], kept=["2 zero3, all sharded"]))
@pytest.mark.slow
def test_what_depends_on_micro_batches_is_the_same_where_steps_are_divided_alike(
    finished, placement
):
    assert_same_run(finished(BY_MICRO_BATCH, "2 ddp"), finished(BY_MICRO_BATCH, placement))


@pytest.mark.parametrize(("part", "reason"), REFUSALS.items())
def test_what_shards_cannot_train_is_refused_on_one_process_too(tmp_path, part, reason):
    refused = run("fit", tmp_path, *BASE, *settings(f"looped {part}"), expect=64)
    assert reason in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("placement", thinned(list(PLACEMENTS)[:4], kept=["2 fsdp2"]))
def test_a_forward_pass_that_changes_parameters_is_refused_on_all_ranks(tmp_path, placement):
    ranks, *strategy = PLACEMENTS[placement]
    words = [*BASE, *settings("teacher"), *strategy]
    for done in run_ranks(ranks, "fit", tmp_path, *words, expect=64):
        assert "changed the values of the parameters parts.0.teacher.weight" in done.stderr


@pytest.mark.slow
def test_an_encoder_with_padding_is_evaluated_as_on_one_process(tmp_path):
    words = [*BASE, *settings("encoder")]
    run("fit", tmp_path / "one", *words)
    run_ranks(2, "fit", tmp_path / "zero3", *words, "strategy=zero3", ALL_SHARDED)
    one, zero3 = (curve(tmp_path / name, "eval/loss") for name in ("one", "zero3"))
    assert largest_difference(one, zero3) <= 1e-5


MOVES = [
    (model, before, after)
    for model in MODELS[:3]
    for before, after in zip(
        ["1", *PLACEMENTS], [*list(PLACEMENTS)[::-1], "1"], strict=True
    )
]  # fmt: skip
MOVES_IN_TEST = [(model, placement, "2 zero3, all sharded") for model, placement in IN_TEST[:2]]
# Hugging Face models name tied weights, and build buffers that no checkpoint holds.
MOVES += [("hf gpt2", "2 zero3, all sharded", "2 fsdp2"), ("hf t5", "2 fsdp2", "1")]
MOVES += [("hf llama", "2 zero3, all sharded", "1"), ("hf bert", "2 zero1", "2 fsdp2")]
MOVES += [(IN_TEST[5][0], "2 zero3, all sharded", "2 fsdp2")]
MOVES += [(BY_MICRO_BATCH, "2 zero3, all sharded", "2 fsdp2"), (BY_MICRO_BATCH, "2 ddp", "2 zero1")]


@pytest.mark.parametrize(
    ("model", "before", "after"),
    thinned(list(dict.fromkeys([*MOVES, *MOVES_IN_TEST])), kept=MOVES_IN_TEST),
)
def test_a_checkpoint_resumes_on_another_placement(finished, tmp_path, model, before, after):
    moved = tmp_path / "moved"
    shutil.copytree(finished(model, before), moved)
    (moved / "finished.json").unlink()
    shutil.rmtree(moved / f"checkpoints/step-{checkpoints(moved)[-1]:012d}")
    fit(moved, model, after)
    attempt = json.loads((moved / "attempts.jsonl").read_text().splitlines()[-1])
    assert attempt["resumed_from_step"] == 3
    assert_same_run(finished(model, before if model == BY_MICRO_BATCH else "1"), moved)


@pytest.mark.slow
@pytest.mark.parametrize("model", thinned([*MODELS[:3], BY_MICRO_BATCH], kept=MODELS[1:2]))
def test_sharded_checkpoints_can_be_evaluated_and_exported(finished, tmp_path, model):
    sharded = MODELS.index(model) if model in MODELS else 1
    directory = finished(model, IN_TEST[sharded + 3][1])
    base = [*BASE, *settings(model)]
    done = run("evaluate", directory, *base, "--json")
    last = list(curve(directory, "eval/loss").values())[-1]
    assert json.loads(done.stdout)["loss"] == pytest.approx(last, rel=1e-5)
    module = exported(directory, tmp_path, base)
    assert torch.isfinite(module(*[torch.ones(2, 8)])).all()


def exported(directory, to, words):
    """The module of an export of the run, whose weights are those of the checkpoint."""
    run("export", directory, *words, "--to", to)
    module, stored = train.load(to, trust=True), tensors(directory)
    own = dict(module.state_dict())
    for name, tensor in stored.items():
        if name.startswith("model.") and name.removeprefix("model.") in own:
            assert torch.equal(own[name.removeprefix("model.")], tensor), name
    return module


@pytest.mark.slow
@pytest.mark.parametrize("model", HF_MODELS)
def test_hugging_face_models_are_evaluated_and_exported(finished, tmp_path, model):
    directory, base = finished(model, "2 fsdp2"), [*BASE, *settings(model)]
    done = run("evaluate", directory, *base, "--json")
    last = list(curve(directory, "eval/loss").values())[-1]
    assert json.loads(done.stdout)["loss"] == pytest.approx(last, rel=1e-5)
    module = exported(directory, tmp_path, base)
    tokens = torch.ones(2, 4, dtype=torch.long)
    given = {"decoder_input_ids": tokens} if model == "hf t5" else {}
    assert torch.isfinite(module(input_ids=tokens, **given).logits).all()


def test_averages_of_a_model_with_a_parameter_without_elements_are_exported(tmp_path):
    words = [*BASE, *settings("empty"), "ema.decay=0.9"]
    run("fit", tmp_path / "run", *words)
    run("export", tmp_path / "run", *words, "--to", tmp_path)

"""Spikes: steps whose loss or gradient norm is far above that of the steps before them."""

import json
import math
import shutil

import pytest
import torch

from tests.support.forked import command, run, run_ranks
from tests.support.lanes import slow
from tests.support.runs import assert_same_bits, checkpoints, curve, state, tensors
from train.data.ledger import Skip, read_steps
from train.optim.spikes import SpikeConfig, SpikeGuard
from train.strategies.single import SingleStrategy

SPIKY = [
    "task.use=tests.faults.tasks:Spiky",
    "model.dropout=0.0",
    "length.steps=30",
    "schedule.use=constant",
    "checkpoint.every_steps=10",
    "checkpoint.keep_last=99",
    "checkpoint.asynchronous=false",
]
TWO = [*SPIKY, "data.spikes=[15,25]"]


def policy(action="skip", factor=10):
    return f"optim.spike={{factor: {factor}, window: 8, action: {action}}}"


def skips(directory):
    return {s.step: s.skip for s in read_steps(directory / "ledger.bin") if s.skip}


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    directory = tmp_path_factory.mktemp("spikes") / "run"
    done = run("fit", directory, *TWO, policy(), "checkpoint.every_steps=1", "ema.decay=0.5")
    return directory, done


def test_a_spike_does_not_change_the_weights(skipping):
    directory, _ = skipping
    for step in (15, 25):
        before, after, later = (tensors(directory, step + offset) for offset in (-1, 0, 1))
        assert_same_bits(before, after)
        assert all(not after[name].equal(later[name]) for name in later)


def test_a_spike_is_recorded_everywhere(skipping):
    directory, done = skipping
    assert skips(directory) == {15: Skip.SPIKE, 25: Skip.SPIKE}
    assert "Step 15 is a spike and was skipped: the loss is " in done.stderr
    counted = curve(directory, "train/spikes")
    assert (counted[14], counted[15], counted[25]) == (0, 1, 2)
    assert curve(directory)[15] is None, "train/loss must leave spikes out"
    assert json.loads((directory / "finished.json").read_text())["spikes"] == 2
    found = command("verify", directory).stdout
    assert "each used exactly once or deliberately skipped (steps 15 (a spike), 25 (a" in found


def test_replay_skips_the_same_steps(skipping):
    directory, _ = skipping
    found = json.loads(command("replay", directory, "--step", "25", "--json").stdout)
    assert (found["skipped"], found["finite"], found["same"]) == (True, True, True)
    text = command("replay", directory, "--step", "25").stdout
    assert "step 25 is skipped: it is a spike (optim.spike)" in text


@pytest.mark.parametrize(
    "strategy", ["zero2", slow("ddp"), slow("fsdp2"), slow("zero3")], ids=lambda name: name
)
def test_any_placement_skips_the_same_steps(skipping, tmp_path, strategy):
    directory, _ = skipping
    words = [policy(), f"strategy={strategy}", "batch.micro_batch_size=2", "ema.decay=0.5"]
    run_ranks(2, "fit", tmp_path / "two", *TWO, *words)
    assert read_steps(tmp_path / "two/ledger.bin") == read_steps(directory / "ledger.bin")
    one, two = (
        curve(directory, "train/gradient_norm"),
        curve(tmp_path / "two", "train/gradient_norm"),
    )
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)


@pytest.mark.slow
def test_a_killed_run_decides_the_same(skipping, tmp_path):
    """Of the eight steps before the second spike, half are known from the checkpoint alone."""
    directory, _ = skipping
    words = [*TWO, policy(), "ema.decay=0.5"]
    run("fit", tmp_path, *words, "task.kill_at_step=23", expect=-9)
    assert len(state(tmp_path, 20)["spikes"]["loss"]) == 8
    run("fit", tmp_path, *words, "--allow-changes")
    assert skips(tmp_path) == {15: Skip.SPIKE, 25: Skip.SPIKE}
    assert_same_bits(tensors(tmp_path, 30), tensors(directory, 30))


@pytest.mark.parametrize("every", [slow(1), 100])
def test_stop_saves_and_a_rerun_goes_on_after_the_step(skipping, tmp_path, every):
    words = [*SPIKY, "data.spikes=[15]", policy("stop"), f"track.log_every_steps={every}"]
    words += ["evaluate.every_steps=15"]
    done = run("fit", tmp_path, *words, expect=78)
    assert "error: Step 15 is a spike (optim.spike.action is stop)" in done.stderr
    assert f"replay {tmp_path} --step 15" in done.stderr
    assert checkpoints(tmp_path) == [10, 15]
    averaged = tensors(skipping[0], 15)
    expected = {name: t for name, t in averaged.items() if not name.startswith("ema.")}
    assert_same_bits(tensors(tmp_path, 15), expected)
    run("fit", tmp_path, *words)
    assert skips(tmp_path) == {15: Skip.SPIKE}
    assert "all well" in command("verify", tmp_path).stdout
    assert list(curve(tmp_path, "eval/loss")) == [15, 30]


def test_a_stop_at_the_last_step_keeps_its_evaluation(tmp_path):
    words = [*SPIKY, "data.spikes=[10]", "length.steps=10", policy("stop")]
    run("fit", tmp_path, *words, expect=78)
    run("fit", tmp_path, *words)
    assert "loss" in json.loads((tmp_path / "finished.json").read_text())["metrics"]


def test_all_ranks_stop(tmp_path):
    words = [*SPIKY, "data.spikes=[15]", policy("stop"), "batch.micro_batch_size=2"]
    for rank in run_ranks(2, "fit", tmp_path, *words, expect=78):
        assert "Step 15 is a spike" in rank.stderr
    assert checkpoints(tmp_path)[-1] == 15


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory):
    """A run that goes back from step 15 to step 10, the text of its first attempt, and what replay
    says of step 15 then."""
    directory = tmp_path_factory.mktemp("back") / "run"
    words = [*SPIKY, "data.spikes=[15]", policy("rollback")]
    done = run("fit", directory, *words, expect=75)
    replayed = command("replay", directory, "--step", "15", "--json").stdout
    run("fit", directory, *words)
    return directory, done.stderr, json.loads(replayed)


def test_a_rollback_goes_on_from_the_checkpoint_with_later_samples(rolled_back):
    directory, text, _ = rolled_back
    sentence = "Step 15 is a spike, so the run goes back to the checkpoint of step 10"
    assert f"error: {sentence} and leaves out positions 120 to 179." in text
    assert f"replay {directory} --step 15 --attempt 1." in text
    steps = read_steps(directory / "ledger.bin")
    assert [s.start_position for s in steps] == [12 * n for n in (*range(10), *range(15, 35))]
    assert [s.step for s in steps] == list(range(1, 31))
    assert json.loads((directory / "finished.json").read_text())["position"] == 35 * 12
    found = command("verify", directory).stdout
    assert "deliberately skipped (positions 120 to 179 (back from step 15 to 10))" in found


def test_steps_after_a_rollback_are_replayed_with_their_samples(rolled_back):
    directory, *_ = rolled_back
    found = json.loads(command("replay", directory, "--step", "14", "--json").stdout)
    assert (found["from"], found["same"]) == (10, True)


def test_a_spike_can_be_replayed_after_the_run_has_gone_back(rolled_back):
    directory, _, before = rolled_back
    assert (before["from"], before["skipped"], before["same"]) == (10, True, True)
    assert len(before["compared"]) == 10
    done = command("replay", directory, "--step", "15", "--attempt", "1", "--json")
    again = json.loads(done.stdout)
    assert (again["skipped"], again["loss"], again["compared"]) == (True, before["loss"], [])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--step=15", "--attempt=3"], "has attempts 1 to 2"),
        (["--step=8", "--attempt=2"], "attempt 2 went on after step 10"),
        (["--step=20", "--attempt=1"], "has steps 1 to 15"),
    ],
)
def test_a_step_that_an_attempt_has_not_taken(rolled_back, words, text):
    (line,) = command("replay", rolled_back[0], *words, expect=64).stderr.splitlines()
    assert text in line


def test_a_run_that_goes_on_from_its_mirror_leaves_out_the_same(tmp_path, rolled_back):
    words = [*SPIKY, "data.spikes=[15]", policy("rollback")]
    words += [f"checkpoint.mirror.url=file://{tmp_path / 'mirror'}"]
    run("fit", tmp_path / "run", *words, expect=75)
    shutil.rmtree(tmp_path / "run")
    run("fit", tmp_path / "run", *words)
    ledgers = [read_steps(path / "ledger.bin") for path in (tmp_path / "run", rolled_back[0])]
    assert ledgers[0] == ledgers[1]


def test_without_a_checkpoint_a_rollback_only_skips(tmp_path):
    words = [*SPIKY, "data.spikes=[15]", policy("rollback"), "checkpoint.every_steps=100"]
    done = run("fit", tmp_path, *words)
    assert "There is no checkpoint before step 15 to go back to." in done.stderr
    assert skips(tmp_path) == {15: Skip.SPIKE}


@pytest.mark.slow
def test_all_ranks_go_back(tmp_path, rolled_back):
    words = [*SPIKY, "data.spikes=[15]", policy("rollback"), "strategy=fsdp2"]
    run_ranks(2, "fit", tmp_path, *words, expect=75)
    run_ranks(2, "fit", tmp_path, *words)
    assert read_steps(tmp_path / "ledger.bin") == read_steps(rolled_back[0] / "ledger.bin")


def test_too_many_in_a_row_end_the_run(tmp_path):
    words = [*SPIKY, "data.spikes=[15,16,17]", "optim.max_skipped_steps=2", policy()]
    done = run("fit", tmp_path, *words, expect=78)
    assert "was a spike or not finite for more than 2 steps in a row" in done.stderr


class Own(SingleStrategy):
    def _update(self, loss_sum, clip_norm):
        self.optimizer.step()
        return loss_sum, torch.zeros(())


def test_a_strategy_that_does_not_ask_is_refused(tmp_path):
    words = ["strategy=tests.faults.test_spikes:Own", policy()]
    done = run("fit", tmp_path, *words, expect=64)
    assert "does not ask skip() whether to take a step" in done.stderr


@pytest.mark.parametrize(
    ("spike", "text"),
    [
        ("{factor: 1}", "optim.spike.factor"),
        ("{window: 5}", "optim.spike.factor"),
        ("{factor: 3, window: 1}", "optim.spike.window"),
        ("{factor: 3, action: skp}", "did you mean skip?"),
        ("{factor: 3, windw: 9}", "did you mean optim.spike.window?"),
        ("3", "optim.spike"),
    ],
)
def test_a_wrong_policy_is_one_sentence(tmp_path, spike, text):
    done = run("fit", tmp_path, f"optim.spike={spike}", expect=64)
    (line,) = done.stderr.splitlines()
    assert text in line


def judged(values, norms=None, **config):
    """Whether each of the steps with these losses is skipped."""
    guard = SpikeGuard(SpikeConfig(**config), torch.device("cpu"))
    norms = norms or [1.0] * len(values)
    pairs = zip(values, norms, strict=True)
    return [
        bool(guard.judge(torch.tensor(2 * v), torch.tensor(n), count=2).skipped) for v, n in pairs
    ]


@pytest.mark.parametrize(
    ("losses", "norms", "skipped"),
    [
        ([1.0, 99.0, 1.0, 1.0, 1.0], None, []),  # not three steps before it
        ([1.0, 1.0, 1.0, 2.1, 2.1, 2.0], None, [3, 4]),  # a spike does not move the median
        ([1.0, 2.0, 1.9, 2.0, 3.9], None, []),  # others do
        ([1.0] * 5, [1.0, 1.0, 1.0, 5.0, 2.0], [3]),
        ([-2.0, -2.0, -2.0, -1.0, 0.5], None, [4]),  # above -2 + 2
        ([0.0, 0.0, 0.0, 7.0], None, []),  # there is nothing to compare with
        ([1.0, 1.0, 1.0, math.nan, math.inf, 1.0], None, [3, 4]),
    ],
)
def test_a_step_is_compared_with_the_median_of_those_before(losses, norms, skipped):
    found = judged(losses, norms, factor=2.0, window=3)
    assert [index for index, skip in enumerate(found) if skip] == skipped


@pytest.mark.parametrize("window", [2, 4, 6])
def test_another_window_takes_the_newest_steps_of_a_checkpoint(window):
    guard = SpikeGuard(SpikeConfig(factor=2.0, window=4), torch.device("cpu"))
    for loss in (1.0, 2.0, 3.0, 4.0):
        guard.judge(torch.tensor(loss), torch.tensor(1.0), count=1)
    other = SpikeGuard(SpikeConfig(factor=2.0, window=window), torch.device("cpu"))
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.state_dict()["loss"] == [1.0, 2.0, 3.0, 4.0][-window:]

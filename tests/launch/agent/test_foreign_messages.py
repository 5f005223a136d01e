"""Somebody else reaches the store of a run and writes there: nothing of it runs, joins or closes."""

import dataclasses
import json
import pickle
import random
import string
from base64 import b64encode
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousStateError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    _BackendRendezvousStateHolder,
    _NodeDesc,
    _RendezvousState,
)

from launch.agent.backend import SignedBackend
from launch.agent.failure import RankFailure
from launch.agent.options import parse
from launch.agent.rendezvous import has_started, join
from launch.agent.reports import Report, Reports
from launch.agent.state import StateError, from_data, to_data
from launch.contract import Messages, RetryError, Signer
from tests.launch.agent.test_agent import end, start, wait_for
from tests.support.hostile import Evil
from tests.support.lanes import slow
from tests.support.runs import free_port

SECRET = b"0123456789abcdef"
KEY = "isorun/rendezvous/run"


def a_state(rng):
    """A state of the rendezvous as torch may have it."""
    nodes = [
        _NodeDesc(f"host-{n}", rng.randrange(1, 2**22), rng.randrange(4))
        for n in range(rng.randrange(6))
    ]
    now = datetime.now(UTC)
    state = _RendezvousState()
    state.round, state.complete, state.closed = rng.randrange(9), rng.random() < 0.5, False
    state.deadline = rng.choice([None, now + timedelta(seconds=1)])
    for rank, node in enumerate(nodes):
        state.last_heartbeats[node] = now - timedelta(microseconds=rng.randrange(10**6))
        place = rng.randrange(3)
        if place == 0:
            state.participants[node] = rank
        else:
            (state.wait_list if place == 1 else state.redundancy_list).add(node)
    return state


def changed(value, rng):
    """Plain data with one place of it changed, removed or replaced."""
    odd = [None, True, -1, 2**70, 1e308, "", "2020-01-01T00:00:00", "x" * 300, [], {}, [[]]]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return {**value, key: changed(value[key], rng)} if rng.random() < 0.9 else {key: 0}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        rest = [changed(value[at], rng)] if rng.random() < 0.9 else []
        return [*value[:at], *rest, *value[at + 1 :]]
    return rng.choice(odd)


# -- the state as plain data ---------------------------------------------------------------------


def test_a_state_comes_back_as_it_was():
    for seed in range(50):
        state = a_state(random.Random(seed))
        assert vars(from_data(json.loads(json.dumps(to_data(state))))) == vars(state)


def test_changed_states_are_refused_or_usable_by_torch():
    refused = 0
    for seed in range(500):
        rng = random.Random(seed)
        data = to_data(a_state(rng))
        for _ in range(rng.randrange(1, 4)):
            data = changed(data, rng)
        try:
            state = from_data(data)
        except StateError:
            refused += 1
            continue
        for node in (*state.participants, *state.wait_list, *state.redundancy_list):
            assert state.last_heartbeats[node] <= datetime.max.replace(tzinfo=UTC)
        assert from_data(json.loads(json.dumps(to_data(state)))).round == state.round
    assert 200 < refused < 500


# -- the backend ---------------------------------------------------------------------------------


@pytest.fixture
def store():
    return TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10)
    )


@pytest.fixture
def stranger(store):
    """Another client of the same store."""
    return TCPStore("127.0.0.1", store.port, timeout=timedelta(seconds=10))


def backend(store, secret=SECRET):
    return SignedBackend(store, Signer(secret, "run"), "run", (2, 2))


def write(kept, round_number):
    """One node's change of the state; returns the text in the store."""
    found = kept.get_state()
    state = pickle.loads(found[0]) if found else _RendezvousState()
    state.round = round_number
    assert kept.set_state(pickle.dumps(state), found and found[1])[2]
    return kept.get_state()[1]


def overwrite(stranger, key, text):
    """Returns when the store has the text: `set` does not wait for it."""
    stranger.set(key, text)
    assert stranger.check([key])


def texts_of_strangers(directory, secret):
    """What somebody without the secret might write under the key."""
    evil = pickle.dumps(Evil(directory / "ran"))
    closed = _RendezvousState()
    closed.closed = True
    state = json.dumps([99, to_data(closed)])
    return {
        "a pickle": evil.decode("latin-1"),
        "a pickle in Base64, as torch has it": b64encode(evil).decode(),
        "nothing": "",
        "the text before the first state": "none",
        "a huge text": "x" * (4 << 20),
        "deep JSON": "-:" + "[" * 100_000,
        "a huge number": "-:" + "9" * 10_000,
        "a closed state without signature": state if secret else "-:[99,{}]",
        "a closed state, unsigned": f"-:{state}" if secret else '-:[1,{"closed":true}]',
        "a closed state with another secret": Signer(b"another secret of 32 bytes", "run")
        .sign(KEY, state.encode())
        .decode(),
        "one of another run": Signer(secret or SECRET, "other").sign(KEY, state.encode()).decode(),
        "one of another key": Signer(secret or SECRET, "run").sign("x", state.encode()).decode(),
        "not ASCII": "\N{SNOWMAN}\0:",
    }


@pytest.mark.parametrize("secret", [SECRET, b""], ids=["signed", "unsigned"])
@pytest.mark.parametrize("name", texts_of_strangers(Path(), b""))
def test_a_text_of_a_stranger_is_refused(store, stranger, tmp_path, name, secret):
    node = backend(store, secret)
    write(node, 1)
    overwrite(stranger, KEY, texts_of_strangers(tmp_path, secret)[name])
    for use in (node.get_state, lambda: node.set_state(pickle.dumps(_RendezvousState()), "x")):
        with pytest.raises(RendezvousStateError, match=r"docs/security.md.*rerun\."):
            use()
    assert not (tmp_path / "ran").exists()


def test_mutations_of_a_signed_state_are_refused(store, stranger):
    node = backend(store)
    good = write(node, 1)
    for seed in range(300):
        rng = random.Random(seed)
        at, letter = rng.randrange(len(good)), rng.choice(string.printable)
        bad = good[:at] + letter + good[at + rng.randrange(2) :]
        overwrite(stranger, KEY, bad)
        if bad != good:
            with pytest.raises(RendezvousStateError):
                node.get_state()
    overwrite(stranger, KEY, good)
    assert pickle.loads(node.get_state()[0]).round == 1


def test_an_earlier_state_is_refused(store, stranger):
    node, other = backend(store), backend(stranger)
    earlier = write(node, 1)
    write(other, 2)
    overwrite(stranger, KEY, earlier)
    assert pickle.loads(node.get_state()[0]).round == 1, "it has not seen a later one"
    with pytest.raises(RendezvousStateError, match="replaced by an earlier one"):
        other.get_state()
    stranger.delete_key(KEY)
    with pytest.raises(RendezvousStateError, match="replaced by an earlier one"):
        node.get_state()


def test_nodes_take_turns(store, stranger):
    """As torch's own backend does: a change of a state that is not the newest has no effect."""
    node, other = backend(store), backend(stranger)
    assert node.get_state() is None
    write(node, 1)
    _, stale = other.get_state()
    write(node, 2)
    found, token, has_set = other.set_state(pickle.dumps(_RendezvousState()), stale)
    assert (pickle.loads(found).round, has_set) == (2, False)
    assert other.set_state(found, token)[2]


def test_torch_reads_no_pickle_of_the_store(store, stranger, tmp_path):
    """torch's own holder of the state, which unpickles what its backend returns."""
    handler_settings = join(parse(["--", "true"], {})).settings
    holder = _BackendRendezvousStateHolder(backend(store), handler_settings, cache_duration=0)
    holder.sync()
    for key in (KEY, "torch.rendezvous.run"):
        overwrite(stranger, key, b64encode(pickle.dumps(Evil(tmp_path / "ran"))).decode())
    with pytest.raises(RendezvousStateError):
        holder.sync()
    assert not (tmp_path / "ran").exists()


def test_nobody_joins_without_the_secret():
    port = free_port()
    words = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--node-rank"]
    node = join(parse([*words, "0", "--", "true"], {"ISORUN_SECRET": "a" * 32}))
    node._state_holder.mark_dirty()
    node._state_holder.sync()
    for environ in ({}, {"ISORUN_SECRET": "b" * 32}):
        with pytest.raises(RetryError, match="Give all processes of the run the same"):
            join(parse([*words, "1", "--", "true"], environ))
    assert not node.is_closed()


def test_a_node_that_has_joined_notices_that_a_stranger_closes_the_rendezvous():
    port = free_port()
    words = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--node-rank", "0"]
    node = join(parse([*words, "--", "true"], {"ISORUN_SECRET": "a" * 32}))
    closed = _RendezvousState()
    closed.closed = True
    stranger = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=10))
    text = json.dumps([99, to_data(closed)])
    overwrite(stranger, "isorun/rendezvous/isorun", Signer().sign("x", text.encode()).decode())
    assert not has_started(node, None)
    for use in (node.is_closed, node.num_nodes_waiting, node.next_rendezvous):
        with pytest.raises(RendezvousStateError, match="has no signature"):
            use()


def test_a_state_of_an_earlier_start_is_refused(store, stranger):
    """The same secret, run and key; its number is higher."""
    earlier = backend(store)
    for number in range(5):
        text = write(earlier, number)
    for key in (KEY, f"{KEY}/start"):
        stranger.delete_key(key)
    node = backend(store)
    write(node, 1)
    overwrite(stranger, KEY, text)
    with pytest.raises(RendezvousStateError, match="wrong signature"):
        node.get_state()


@pytest.mark.normal
@pytest.mark.parametrize("secret", ["0" * 32, slow("")])
def test_an_agent_ends_with_75_and_a_sentence(tmp_path, secret):
    port = free_port()
    agent = start(
        "--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--node-rank", "0", "--preflight",
        "off", script="", env={"ISORUN_SECRET": secret},
    )  # fmt: skip
    stranger = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=120))
    stranger.wait(["isorun/rendezvous/isorun"], timedelta(seconds=120))
    stranger.set("isorun/rendezvous/isorun", pickle.dumps(Evil(tmp_path / "ran")).decode("latin-1"))
    code, _, errors = end(agent)
    assert code == 75, errors
    assert not (tmp_path / "ran").exists()
    assert "in the store of the run" in errors
    assert "Traceback" not in errors
    assert (secret or "no secret") not in errors


@pytest.mark.slow
def test_a_run_ends_with_75_when_a_stranger_replaces_its_state(tmp_path):
    port, started = free_port(), tmp_path / "started"
    agent = start(
        "--nnodes", "1:2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--node-rank", "0",
        "--preflight", "off", script=f"import time; open({str(started)!r}, 'w'); time.sleep(300)",
        env={"ISORUN_SECRET": "0" * 32},
    )  # fmt: skip
    wait_for(started, 120)
    stranger = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=60))
    stranger.set("isorun/rendezvous/isorun", pickle.dumps(Evil(tmp_path / "ran")).decode("latin-1"))
    code, _, errors = end(agent)
    assert code == 75, errors
    assert not (tmp_path / "ran").exists()
    said = [line for line in errors.splitlines() if line.startswith("isorun:")]
    assert "message 'isorun/rendezvous/isorun' in the store of the run has" in "".join(said), said
    assert "Traceback" not in errors


# -- reports -------------------------------------------------------------------------------------

FAILURE = RankFailure(1, 0, "host", 7, 75, "text", 1.0, ["line"])


def pair(store, secret):
    """The reports of an honest node 0, and of a node 1 that has another secret."""
    honest = Reports(Messages(store, Signer(SECRET, "run"), "round 1"), 0, 2)
    return honest, Reports(Messages(store, Signer(secret, "run"), "round 1"), 1, 2)


@pytest.mark.parametrize("secret", [b"", b"another secret of 32 bytes"])
def test_reports_of_a_stranger_do_not_count(secret):
    honest, stranger = pair(HashStore(), secret)
    stranger.exchange(Report(1, [FAILURE], leaving=False), lambda _: True, lambda _: 0.0)
    stranger._messages.publish("isorun/report/1/lost")
    assert not honest.somebody_failed()
    assert honest.lost() == []
    found, lost = honest.exchange(Report(0, [], leaving=False), lambda _: False, lambda _: 0.0)
    assert ([report.node for report in found], lost) == ([0], [1])


def test_reports_of_another_round_do_not_count():
    store = HashStore()
    honest, other = pair(store, SECRET)
    other._messages = Messages(store, Signer(SECRET, "run"), "round 2")
    other.exchange(Report(1, [FAILURE], leaving=False), lambda _: True, lambda _: 0.0)
    assert not honest.somebody_failed()


def test_changed_reports_are_refused():
    good = dataclasses.asdict(Report(1, [FAILURE], leaving=False))
    assert Report.of(json.loads(json.dumps(good))) == Report(1, [FAILURE], leaving=False)
    for seed in range(300):
        bad = changed(good, random.Random(seed))
        try:
            report = Report.of(bad)
        except ValueError:
            continue
        assert all(isinstance(failure, RankFailure) for failure in report.failures)


@pytest.mark.parametrize("secret", [SECRET, b""])
def test_messages_of_strangers_end_in_one_error(secret):
    store = HashStore()
    messages = Messages(store, Signer(secret, "run"), "scope")
    messages.publish("key", {"a": [1, 2.5, "text", None]})
    good = store.get("key")
    assert messages.read("key") == {"a": [1, 2.5, "text", None]}
    for seed in range(300):
        rng = random.Random(seed)
        at = rng.randrange(len(good) + 1)
        bad = good[:at] + rng.randbytes(rng.randrange(3)) + good[at + rng.randrange(3) :]
        store.set("key", bad)
        with suppress(RetryError):
            value = messages.read("key")
            assert bad == good or not secret
            json.dumps(value)

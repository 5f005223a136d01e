"""The agents of a run wait for each other's reports, but not longer than they may."""

import time
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from launch.agent import reports as reports_module
from launch.agent.reports import Report, Reports
from launch.contract import Messages, Signer


def messages(store=None, secret=b"a secret of the run", scope="round 1"):
    return Messages(store or HashStore(), Signer(secret, "a-run"), scope)


def at_once(_):
    return 0.0


def never(_):
    return float("inf")


def test_a_node_that_does_not_report_in_time_is_lost():
    reports, lost = Reports(messages(), 0, 2).exchange(
        Report(0, [], leaving=True), lambda _: False, at_once
    )
    assert ([report.node for report in reports], lost) == ([0], [1])


def test_a_report_that_is_there_is_read_even_after_the_time():
    store = messages()
    own = Report(1, [], leaving=False)
    Reports(store, 1, 2).exchange(own, lambda _: True, never)
    reports, lost = Reports(store, 0, 2).exchange(
        Report(0, [], leaving=True), lambda _: False, at_once
    )
    assert ([report.node for report in reports], lost) == ([0, 1], [])


def test_the_time_starts_when_a_node_falls_silent():
    since = []
    before = time.monotonic()

    def due(silent_since):
        since.append(silent_since)
        return silent_since

    Reports(messages(), 0, 2).exchange(Report(0, [], leaving=False), lambda _: False, due)
    assert before <= since[0] <= time.monotonic()


def test_the_node_that_keeps_the_store_does_not_wait_longer_for_readers():
    Reports(messages(), 0, 2).finish(keeps_store=True, lost=[], due=at_once)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass for the reports."""
    passed = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: passed[0], sleep=time.sleep)
    monkeypatch.setattr(reports_module, "time", clock)

    def wait(seconds, *alive):
        for _ in range(seconds):
            passed[0] += 1.1
            for node in alive:
                node.heartbeat()
                node.watch(25.0)

    return wait


def test_a_node_that_falls_silent_is_noticed_while_nothing_else_happens(clock):
    store = messages()
    nodes = [Reports(store, number, 4) for number in range(4)]
    clock(60, *nodes)
    assert not any(node.somebody_failed() for node in nodes)
    clock(20, *nodes[:2], nodes[3])
    assert not nodes[0].somebody_failed()
    clock(10, *nodes[:2], nodes[3])
    for node in (nodes[0], nodes[1], nodes[3]):
        assert node.somebody_failed()
        assert node.lost() == [2]


def test_a_node_that_is_known_to_be_lost_is_not_waited_for(clock):
    nodes = [Reports(store, number, 2) for store in [messages()] for number in range(2)]
    clock(30, nodes[0])
    found, lost = nodes[0].exchange(Report(0, [], leaving=False), lambda _: False, never)
    assert ([report.node for report in found], lost) == ([0], [1])


def test_the_node_that_keeps_the_store_is_watched_as_well(clock):
    nodes = [Reports(store, number, 3) for store in [messages()] for number in range(3)]
    clock(30, *nodes[1:])
    assert nodes[2].lost() == [0]


def test_a_node_that_was_lost_and_reports_is_not_lost(clock):
    nodes = [Reports(store, number, 2) for store in [messages()] for number in range(2)]
    clock(30, nodes[0])
    assert nodes[0].lost() == [1]
    nodes[1].exchange(Report(1, [], leaving=False), lambda _: True, never)
    assert nodes[0].lost() == []


def test_nodes_that_were_paused_together_are_not_lost(clock):
    nodes = [Reports(store, number, 2) for store in [messages()] for number in range(2)]
    clock(3, *nodes)
    clock(100)
    nodes[0].watch(25.0)
    assert not nodes[0].somebody_failed()
    clock(3, *nodes)
    assert not nodes[0].somebody_failed()


def test_a_node_that_has_reported_and_ended_is_not_lost(clock):
    nodes = [Reports(store, number, 2) for store in [messages()] for number in range(2)]
    nodes[1].exchange(Report(1, [], leaving=True), lambda _: True, never)
    clock(60, nodes[0])
    assert not nodes[0].somebody_failed()

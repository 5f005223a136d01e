"""The agents of a run wait for each other's reports, but not longer than they may."""

import time

from torch.distributed import HashStore

from launch.agent.reports import Report, Reports


def at_once(_):
    return 0.0


def never(_):
    return float("inf")


def test_a_node_that_does_not_report_in_time_is_lost():
    reports, lost = Reports(HashStore(), 0, 2).exchange(
        Report(0, [], leaving=True), lambda _: False, at_once
    )
    assert ([report.node for report in reports], lost) == ([0], [1])


def test_a_report_that_is_there_is_read_even_after_the_time():
    store = HashStore()
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

    Reports(HashStore(), 0, 2).exchange(Report(0, [], leaving=False), lambda _: False, due)
    assert before <= since[0] <= time.monotonic()


def test_the_node_that_keeps_the_store_does_not_wait_longer_for_readers():
    Reports(HashStore(), 0, 2).finish(keeps_store=True, lost=[], due=at_once)

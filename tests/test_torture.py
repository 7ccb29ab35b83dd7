"""Small versions of tests/torture.py."""

import pytest
import torture


def test_kills():
    """A base that SIGKILL leaves unreadable, or without what was acknowledged."""
    found = torture.kills(3, seed=1, longest=0.3)
    assert found["kills"] == 3 and found["wrong"] == 0


def test_faults():
    """A traceback, or other texts and memories than there were, after damage."""
    found = torture.faults(6, seed=2)
    assert sum(found.values()) == 6
    assert set(found) <= {"refused in one line", "healed or harmless"}


@pytest.mark.slow
def test_many_faults():
    found = torture.faults(80, seed=3)
    assert set(found) == {"refused in one line", "healed or harmless"}


@pytest.mark.slow
def test_crowd():
    """A reader that gets another text's memory beside a writer; a lost fact of two writers."""
    found = torture.crowd(3, writers=2, readers=2)
    assert found["changes"] and found["asked"]
    assert (found["wrong"], found["lost"], found["missing"]) == (0, 0, 0)


def test_stops():
    """A reader that hangs behind a stopped writer; a second writer that waits for ever, or whose
    turn never comes; a fact lost meanwhile."""
    found = torture.stops(1, wait=1)
    assert (found["stops"], found["wrong"], found["refused in time"]) == (1, 0, 1)
    assert found["seconds_to_read_all"] < 60

"""read_ahead.py: items are read in threads, in order, only so far ahead; results wait for the next one to be begun."""

import threading

import pytest

from captioning.read_ahead import READ_AHEAD, one_behind, read_ahead


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
def test_batches_come_in_order_whatever_their_size(size):
    batches = list(read_ahead("abcdefg", str.upper, size))
    assert [item for batch in batches for item, _ in batch] == list("abcdefg")
    assert all(len(batch) == size for batch in batches[:-1])
    assert [future.result() for batch in batches for _, future in batch] == list("ABCDEFG")


def test_only_a_few_batches_are_read_ahead():
    """Memory: a folder of a million images must not be in it."""
    taken = []
    batches = read_ahead((taken.append(n) or n for n in range(100)), abs, 1)
    for _, future in next(batches):
        future.result()
    batches.close()
    assert len(taken) <= 1 + READ_AHEAD


def test_the_next_item_is_read_while_this_one_is_used():
    begun = [threading.Event() for _ in range(3)]
    for [(item, future)] in read_ahead(range(3), lambda n: begun[n].set() or threading.current_thread(), 1, threads=1):
        assert future.result() is not threading.main_thread()
        assert begun[min(item + 1, 2)].wait(60)  # we are still at this item, and do nothing but wait


def test_what_reading_raises_is_raised_where_the_item_is_used():
    def read(name):
        if name == "b":
            raise ValueError("b: not an image")
        return name

    batches, seen = read_ahead("abc", read, 1, threads=1), []
    with pytest.raises(ValueError, match="b: not an image"):
        for [(_, future)] in batches:
            seen.append(future.result())
    assert seen == ["a"]
    batches.close()


def test_who_stops_early_waits_for_what_is_being_read_and_for_no_more():
    started, go, read = threading.Event(), threading.Event(), []

    def slow(number):
        started.set()
        go.wait(60)
        read.append(number)

    batches = read_ahead(range(100), slow, 1, threads=1)
    next(batches)
    started.wait(60)
    threading.Timer(0.05, go.set).start()
    batches.close()
    assert read == [0]


def test_a_result_comes_once_the_next_has_been_begun_and_before_the_next_ones_failure():
    order = []

    def begun():
        for number in range(3):
            order.append(f"begin {number}")
            if number == 2:
                raise ValueError("full")
            yield number

    with pytest.raises(ValueError, match="full"):
        order.extend(f"use {number}" for number in one_behind(begun()))
    assert order == ["begin 0", "begin 1", "use 0", "begin 2", "use 1"]
    assert list(one_behind([])) == [] and list(one_behind("ab")) == ["a", "b"]

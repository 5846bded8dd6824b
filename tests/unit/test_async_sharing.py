"""Who gets which batches of an asynchronous run: stragglers, orders without an end, loops that leave an epoch early."""

from dataclasses import dataclass

import pytest

from lightning_accel.async_sgd import LeaseBook, Settings
from lightning_accel.async_sgd.policy.sharing import LeaseAnswer, LeaseRequest, Sharing, Situation


@dataclass
class Member:
    worker: int
    epoch: int = -1
    leased_epoch: int = -1
    idle: bool = False
    active: bool = True


class Run:
    """Two or more workers, of which number 0 coordinates, and a clock that is set by hand."""

    def __init__(self, workers=2, **settings):
        self.settings = Settings(**{"straggler_grace": 5.0, "lease_batches": 4, **settings})
        self.book = LeaseBook(block=self.settings.lease_batches)
        self.sharing = Sharing(self.book, self.settings, workers)
        self.members = [Member(worker) for worker in range(workers)]
        self.now = 0.0
        self.frozen = False

    def ask(self, worker, epoch, **answered):
        at = Situation(self.now, coordinator=0, live=len(self.members), steps=0, frozen=self.frozen)
        return self.sharing.answer(self.members[worker], self.members, LeaseRequest(epoch, **answered), at)

    def begin(self, units, epoch=0):
        assert self.ask(0, epoch) == LeaseAnswer(known=0)
        return self.ask(0, epoch, units=list(range(units)))

    def ids(self, answer):
        return [lease.id for lease in answer.leases]


def commit(run, worker, answer):
    run.book.commit(worker, run.ids(answer))


def test_the_end_of_an_epoch_waits_for_a_straggler_for_the_grace_and_takes_its_batches_over_one_by_one():
    run = Run()
    mine = run.begin(8)
    theirs = run.ask(1, 0)
    assert run.ids(theirs) == [(0, 2)]
    run.now = 100.0
    others = run.ask(1, 0), run.ask(1, 0), run.ask(1, 0), run.ask(1, 0), run.ask(1, 0)
    held = [(0, 2), *(lease for answer in others for lease in run.ids(answer))]
    assert held == [(0, i) for i in range(2, 8)]
    commit(run, 0, mine)
    assert run.ask(0, 0) is None, "it waits for the other"
    run.now += 4.9
    assert run.ask(0, 0) is None
    run.book.commit(1, [(0, 2), (0, 3)])
    run.now += 0.2
    taken = run.ask(0, 0)
    assert run.ids(taken) == [(0, 7)], "the one that the other would train last"
    assert not run.book.holds(1, [(0, 7)]), "so that its push of it is refused"
    assert run.book.holds(1, [(0, 4), (0, 5), (0, 6)])
    commit(run, 0, taken)
    run.book.commit(1, [(0, 4), (0, 5)])
    assert run.ids(run.ask(0, 0)) == [(0, 6)]
    run.book.commit(0, [(0, 6)])
    assert run.ask(0, 0) == LeaseAnswer(), "the epoch is over"
    assert run.sharing.taken_over == 2
    assert run.book.remaining() == 0


def test_nobody_is_called_late_while_pushes_are_not_applied():
    run = Run()
    mine = run.begin(4)
    while run.ids(run.ask(1, 0)):
        pass
    commit(run, 0, mine)
    assert run.ask(0, 0) is None
    run.now, run.frozen = 60.0, True
    assert run.ask(0, 0) is None
    run.frozen = False
    assert len(run.ask(0, 0).leases) == 1


def test_only_the_coordinator_waits_at_the_end_of_an_epoch():
    run = Run(3)
    run.begin(6)
    while run.ids(run.ask(1, 0)):
        pass
    assert run.ask(2, 0) == LeaseAnswer(), "it goes on to the next epoch"


def test_epochs_with_a_batch_for_the_coordinator_alone_are_not_run_through_ahead_of_it():
    run = Run()
    mine = run.begin(1)
    assert run.ask(1, 0) == LeaseAnswer(), "it goes on to the next epoch"
    assert run.ask(1, 1) == LeaseAnswer(known=0)
    assert run.ask(1, 1, units=[0]) is None, "its only batch is the coordinator's: it waits"
    commit(run, 0, mine)
    assert run.ids(run.ask(0, 1)) == [(1, 0)]
    assert run.ask(1, 1) == LeaseAnswer()
    run.ask(1, 2)
    assert run.ask(1, 2, units=[0]) is None
    run.members[0].active = False
    at = Situation(run.now, coordinator=1, live=1, steps=0)
    taken = run.sharing.answer(run.members[1], run.members, LeaseRequest(2), at)
    assert run.ids(taken) == [(2, 0)], "it coordinates itself now"


def test_who_waits_for_the_coordinator_goes_when_the_run_is_over():
    run = Run()
    run.begin(1)
    run.ask(1, 1)
    assert run.ask(1, 1, units=[0]) is None
    over = Situation(run.now, coordinator=0, live=2, steps=0, stopped=True)
    assert run.sharing.answer(run.members[1], run.members, LeaseRequest(1), over) == LeaseAnswer()


def test_an_epoch_ahead_of_the_coordinator_is_trained_on_where_it_has_enough_batches():
    run = Run()
    run.begin(1)
    run.ask(1, 1)
    assert run.ids(run.ask(1, 1, units=[0, 1, 2])), "the coordinator's is left"


def test_a_worker_that_never_gives_the_order_it_was_asked_for_is_not_waited_for():
    run = Run()
    assert run.ask(1, 0) == LeaseAnswer(known=0)
    assert run.ask(0, 0) is None
    run.now = 5.1
    assert run.ask(0, 0) == LeaseAnswer(known=0)
    assert run.ask(1, 0, units=["other", "order"]) is None, "two orders of one epoch do not fit together"
    assert not run.book.has_order(0)
    assert [lease.unit for lease in run.ask(0, 0, units=["a", "b"]).leases] == ["a"]


def test_a_dead_worker_is_not_asked_for_the_order():
    run = Run()
    assert run.ask(1, 0) == LeaseAnswer(known=0)
    run.members[1].active = False
    assert run.ask(0, 0) == LeaseAnswer(known=0)


def test_an_order_without_a_length_grows_while_it_is_trained_on():
    run = Run(1)
    assert run.ask(0, 0) == LeaseAnswer(known=0)
    for i in range(5):
        answer = run.ask(0, 0, units=[f"unit {i}"], known=i, complete=False)
        assert [lease.unit for lease in answer.leases] == [f"unit {i}"]
        commit(run, 0, answer)
        assert run.book.current_epoch() == 0, "it may go on for ever"
        assert run.ask(0, 0) == LeaseAnswer(known=i + 1)
    (state,) = run.book.state()
    assert state["complete"] is False
    assert state["done"] == [0, 1, 2, 3, 4]
    assert run.ask(0, 0, units=[], known=5, complete=True) == LeaseAnswer()
    assert run.book.remaining() == 0
    with pytest.raises(ValueError, match="the order of epoch 0 is complete or was never begun"):
        run.book.extend(0, ["late"], complete=False)


def test_several_workers_share_an_order_without_a_length_and_another_draws_on_when_one_dies():
    run = Run(2, lease_batches=1)
    run.ask(0, 0)
    run.ask(0, 0, units=list("abcd"), complete=False)
    seen = [lease.unit for _ in range(3) for lease in run.ask(1, 0).leases]
    assert seen == ["b", "c", "d"]
    assert run.ask(1, 0) is None, "the coordinator draws on"
    run.members[0].active = False
    assert run.ask(1, 0) == LeaseAnswer(known=4)
    assert [lease.unit for lease in run.ask(1, 0, units=["e"], known=4, complete=True).leases] == ["e"]


def test_what_a_lone_loop_leaves_of_an_epoch_is_left_for_good():
    run = Run(1)
    first = run.begin(8)
    run.book.commit(0, run.ids(first)[:1])
    run.book.give_back(0, run.ids(first)[1:])
    assert run.ask(0, 1) == LeaseAnswer(known=0), "the next epoch begins, without what is left of this one"
    answer = run.ask(0, 1, units=["x", "y"])
    assert {lease.epoch for lease in answer.leases} == {1}
    assert run.book.current_epoch() == 1
    assert run.book.remaining() == 2


def test_what_several_workers_leave_of_an_epoch_goes_to_others():
    run = Run(2)
    mine = run.begin(8)
    run.book.give_back(0, run.ids(mine))
    assert run.ids(run.ask(1, 0))[0] == (0, 0)

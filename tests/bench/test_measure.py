import itertools
import time

import torch
from peft_kernels.bench.measure import MAX_CALLS, Budget, LocalContestant, interleave
from peft_kernels.bench.stats import MIN_CLEAN_ROUNDS, Sample

CALIBRATION = 2  # samples taken before the first round


class Scripted:
    """A contestant whose seconds per call come from a script, and which notes its turns."""

    def __init__(self, name, seconds, turns, share=1.0):
        self.name, self.turns, self.share = name, turns, share
        self.seconds = itertools.cycle(seconds)

    def sample(self, calls):
        self.turns.append((self.name, calls))
        wall = next(self.seconds) * calls
        return Sample(wall, wall * self.share, calls)


def race(scripts, budget, share=1.0):
    turns = []
    contestants = {name: Scripted(name, seconds, turns, share) for name, seconds in scripts.items()}
    rounds = interleave(contestants, "ours", 1, budget, seed=0)
    return rounds, [name for name, _ in turns[CALIBRATION * len(scripts) :]]


STEADY = {"ours": [0.01], "slow": [0.03], "fast": [0.02]}


def test_every_round_has_everyone_once_and_orders_differ():
    rounds, turns = race(STEADY, Budget(min_seconds=0.0))
    orders = [tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert len(orders) == len(rounds["ours"]) == MIN_CLEAN_ROUNDS
    assert all(sorted(order) == sorted(STEADY) for order in orders)
    assert len(set(orders)) > 1


def test_a_settled_contestant_sits_out_while_an_unsettled_one_goes_on():
    scripts = {"ours": [0.01], "settled": [0.02], "restless": [0.02, 0.03, 0.04]}
    rounds, _ = race(scripts, Budget(min_seconds=0.0, max_seconds=0.05))
    assert sum(sample is not None for sample in rounds["settled"]) == MIN_CLEAN_ROUNDS
    assert rounds["settled"][-1] is None
    assert None not in rounds["restless"]
    assert None not in rounds["ours"]  # every ratio needs ours


def test_time_is_up_but_the_fewest_rounds_are_taken():
    rounds, _ = race({"ours": [0.01], "restless": [0.02, 0.03, 0.04]}, Budget(max_seconds=0.0))
    assert len(rounds["ours"]) == MIN_CLEAN_ROUNDS


def test_a_disturbed_machine_does_not_keep_it_for_ever():
    rounds, _ = race(STEADY, Budget(max_seconds=0.0), share=0.5)
    assert len(rounds["ours"]) == 2 * MIN_CLEAN_ROUNDS


def test_fast_contestants_get_many_calls_a_sample():
    turns = []
    contestants = {
        name: Scripted(name, [seconds], turns) for name, seconds in (("ours", 1e-3), ("a", 1e-9), ("b", 1.0))
    }
    interleave(contestants, "ours", 1, Budget(max_seconds=0.0), seed=0)
    assert dict(turns) == {"ours": 5, "a": MAX_CALLS, "b": 1}


def test_a_call_that_fills_a_sample_many_times_is_not_made_twice_to_find_out():
    turns = []
    scripts = {"ours": 0.01, "slow": 1.0}
    contestants = {name: Scripted(name, [seconds], turns) for name, seconds in scripts.items()}
    interleave(contestants, "ours", 1, Budget(max_seconds=0.0), seed=0)
    assert [name for name, _ in turns].count("ours") == CALIBRATION + MIN_CLEAN_ROUNDS
    assert [name for name, _ in turns].count("slow") == 1 + MIN_CLEAN_ROUNDS


def test_page_faults_are_those_of_the_calls():
    kept = torch.ones(4096)
    quiet = LocalContestant([lambda: kept.add_(1)])
    fresh = LocalContestant([lambda: torch.empty(64 << 20, dtype=torch.uint8).fill_(1)])  # mapped anew
    quiet.sample(3)
    assert quiet.sample(100).faults < 10
    assert fresh.sample(2).faults >= 2 * 64 / 2  # pages of 4 KiB or of 2 MiB


def test_local_contestant_rotates_and_times_only_its_calls():
    order = []
    contestant = LocalContestant([lambda: order.append(0), lambda: order.append(1), lambda: time.sleep(0.02)])
    sample = contestant.sample(4)
    assert order == [0, 1, 0]
    assert sample.calls == 4
    assert 0.02 <= sample.wall < 1.0
    assert sample.cpu < sample.wall  # asleep is not busy: such a round is dropped
    assert sample.seconds == sample.wall / 4

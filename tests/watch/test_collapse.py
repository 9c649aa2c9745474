"""The collapse watch on hand-made rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from nrt_megatron.recipe import Sign, Watch
from nrt_megatron.watch import CollapseError, CollapseWatch
from nrt_megatron.watch.collapse import METRICS

OFF = Watch(**dict.fromkeys(METRICS, Sign()))
HEALTHY = {
    "trace/entropy": 1.0,
    "trace/length_mean": 20.0,
    "trace/empty_share": 0.1,
    "trace/distinct_2gram": 0.5,
    "reward/degenerate_group_share": 0.2,
    "reward/group_std_mean": 0.03,
}


def only(group_size: int = 8, **signs: Sign) -> CollapseWatch:
    return CollapseWatch(replace(OFF, **signs), group_size)


def judge(watch: CollapseWatch, values: list[float | None], metric: str, first: int = 1) -> list[list[str]]:
    """The lines of each step; None: the row lacks the metric."""
    rows = [HEALTHY | {metric: value} for value in values]
    rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
    return [watch.judge(step, row)[1] for step, row in enumerate(rows, start=first)]


@pytest.mark.parametrize(
    ("sign", "bounds", "outside"),
    [
        ("entropy", {"below": 0.02}, 0.01),
        ("entropy", {"above": 6.0}, 7.0),
        ("length", {"below": 4.0}, 3.9),
        ("length", {"above": 100.0}, 101.0),
        ("empty_share", {"above": 0.5}, 0.51),
        ("distinct_2gram", {"below": 0.05}, 0.01),
        ("degenerate_group_share", {"above": 0.9}, 0.95),
        ("group_std", {"below": 0.001}, 0.0),
    ],
)
def test_every_sign_looks_at_its_metric(sign, bounds, outside):
    watch, key = only(**{sign: Sign(**bounds, steps=2)}), METRICS[sign]
    (side, bound), *_ = bounds.items()
    assert judge(watch, [bound, outside], key) == [[], []], "at its bound a value is inside"
    ((line,),) = judge(watch, [outside], key, first=3)
    assert f"{key} {outside:g} is {side} watch.{sign}.{side} = {bound:g}, 2 steps in a row since step 2" in line
    assert watch.due() is None, "warn asks for nothing"


@pytest.mark.parametrize(
    ("values", "steps", "alarms"),
    [
        ([0.9, 0.9, 0.9, 0.9], [1, 2, 3, 4], [0, 0, 1, 1]),
        ([0.9, 0.9, 0.1, 0.9, 0.9], [1, 2, 0, 1, 2], [0, 0, 0, 0, 0]),
        ([0.9, None, 0.9, 0.9], [1, 1, 2, 3], [0, 0, 0, 1]),  # a step without the metric neither counts nor ends it
        ([0.9, 0.9, math.nan, 0.9], [1, 2, 2, 3], [0, 0, 0, 1]),
        ([0.9, 0.9, 0.9, 0.1], [1, 2, 3, 0], [0, 0, 1, 0]),
    ],
)
def test_steps_in_a_row_are_counted_in_the_metrics(values, steps, alarms):
    watch = only(empty_share=Sign(above=0.5, steps=3))
    rows = [watch.judge(step, HEALTHY | {"trace/empty_share": value})[0] for step, value in enumerate(values, 1)]
    assert [row["watch/empty_share"] for row in rows] == steps
    assert [row["watch/alarms"] for row in rows] == alarms
    assert all(set(row) == {"watch/empty_share", "watch/alarms", "watch/rollbacks"} for row in rows)


def test_one_line_at_the_beginning_of_an_episode_and_one_at_its_end():
    watch = only(empty_share=Sign(above=0.5, steps=2))
    said = judge(watch, [0.9] * 5 + [0.1] * 3 + [0.9, 0.1, 0.9, 0.9], "trace/empty_share")
    assert [len(lines) for lines in said] == [0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert said[5] == ["collapse watch: trace/empty_share 0.1 is inside again after 5 steps"]


def test_a_row_without_traces_is_not_judged():
    watch = CollapseWatch(Watch(), 8)
    assert watch.judge(0, {"eval/accuracy": 0.1}) == ({}, [])
    assert watch.judge(1, {"loss": 1.0}) == ({}, []), "the scheme `sft`"


def test_a_group_of_one_has_no_spread():
    watch = CollapseWatch(Watch(), 1)
    for step in range(1, 20):
        metrics, lines = watch.judge(step, HEALTHY | {"reward/degenerate_group_share": 1.0})
        assert lines == [] and "watch/degenerate_group_share" not in metrics


def test_the_defaults_only_warn_and_leave_a_run_that_learns_alone():
    """Numbers of recipes/nrt-tiny-1n0g-cpu.yaml: at its end it has one right trace, and most groups are alike."""
    ends = {"trace/entropy": 0.035, "trace/distinct_2gram": 0.12, "reward/degenerate_group_share": 0.75}
    watch = CollapseWatch(Watch(), 8)
    assert not any(watch.judge(step, HEALTHY | ends | {"trace/length_mean": 13.0})[1] for step in range(1, 40))
    for step in range(40, 60):
        watch.judge(step, HEALTHY | {"trace/length_mean": 0.0, "trace/empty_share": 1.0, "trace/entropy": 0.01})
    assert watch.due() is None and watch.spared == frozenset()


def test_stop_is_heeded_before_rollback():
    signs = {"length": Sign(below=4.0, steps=1, action="rollback"), "entropy": Sign(below=0.5, steps=2, action="stop")}
    watch = only(**signs)
    bad = HEALTHY | {"trace/length_mean": 1.0, "trace/entropy": 0.1}
    watch.judge(1, bad)
    assert watch.due().sign == "length"
    watch.judge(2, bad)
    assert (watch.due().sign, watch.due().steps, watch.due().since) == ("entropy", 2, 1)


ROLLBACK = Sign(below=4.0, steps=3, action="rollback")


@pytest.mark.parametrize(
    ("lengths", "saves", "good"),
    [
        ([9, 9, 9, 9, 9], {2}, 2),
        ([9, 9, 1, 1, 1], {2}, None),  # the row after it, which its weights made, is outside
        ([9, 9, 9, 1, 1, 1], {2}, 2),
        ([9, 9, 9, 9, 1, 1], {2, 4}, 2),
        ([9, 9, 9, 1, 9, 9, 1], {2, 4, 6}, 2),  # saved outside; saved inside and outside in the next
        ([9, 9, 9, 1, 9, 9, 9], {2, 4, 6}, 6),
        ([1, 1, 1], {2}, None),
        ([9, 9, 9], {3}, None),  # nobody has seen its traces yet
    ],
)
def test_which_checkpoint_is_from_before(lengths, saves, good):
    watch = only(length=ROLLBACK)
    for step, length in enumerate(lengths, 1):
        watch.judge(step, HEALTHY | {"trace/length_mean": float(length)})
        if step in saves:
            watch.saving(step)
    assert watch.good == good
    assert watch.spared == (frozenset() if good is None else {good})


UNFIT = {"length": ROLLBACK, "entropy": Sign(below=0.5)}


@pytest.mark.parametrize(
    ("signs", "entropies", "said_at"),
    [
        (UNFIT, [0.1] * 8, [2]),  # once, at the first checkpoint, and not at the rollback that it prevents
        (UNFIT, [1.0] * 8, []),
        (UNFIT, [1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1], []),  # there is one to go back to
        (UNFIT, [1.0, 1.0, 0.1, 0.1, 0.1, 1.0, 1.0, 1.0], [4]),  # that of step 2 did not count in the end
        ({**UNFIT, "length": replace(ROLLBACK, action="stop")}, [0.1] * 8, []),  # nobody asks for a good one
    ],
)
def test_it_is_said_at_once_that_no_checkpoint_counts(signs, entropies, said_at):
    watch, said = only(**signs), {}
    for step, entropy in enumerate(entropies, 1):
        watch.judge(step, HEALTHY | {"trace/entropy": entropy})
        if step % 2 == 0 and (lines := watch.saving(step)):
            said[step] = lines
    assert list(said) == said_at
    for step, (line,) in said.items():
        seen = "trace/entropy 0.1 is below watch.entropy.below = 0.5"
        assert line.startswith(f"collapse watch: still no checkpoint to roll back to at step {step}: {seen}")
        assert line.endswith("set watch.entropy.below to what fits or null")


def test_a_sign_that_only_warns_counts_for_what_is_good_too():
    watch = only(length=ROLLBACK, entropy=Sign(below=0.5))
    watch.judge(1, HEALTHY | {"trace/entropy": 0.1})
    watch.saving(1)
    watch.judge(2, HEALTHY)
    assert watch.good is None


def test_state_survives_json_at_every_step():
    lengths = [9, 9, 1, 1, None, 1, 9, 9, 1, 1, 1]
    for cut in range(len(lengths)):
        through, left = only(length=ROLLBACK), only(length=ROLLBACK)
        for step, length in enumerate(lengths, 1):
            row = HEALTHY | ({} if length is None else {"trace/length_mean": float(length)})
            if step == cut:
                state = json.loads(json.dumps(left.state_dict()))
                left = only(length=ROLLBACK)
                left.load_state_dict(state)
            assert through.judge(step, row) == left.judge(step, row)
            assert through.due() == left.due() and through.state_dict() == left.state_dict()
            through.saving(step), left.saving(step)


def test_after_a_rollback_it_begins_anew():
    watch = only(length=ROLLBACK)
    judge(watch, [9.0, 9.0], "trace/length_mean")
    watch.saving(2)
    judge(watch, [9.0, 1.0, 1.0, 1.0], "trace/length_mean", first=3)
    assert watch.due().action == "rollback" and watch.good == 2
    watch.gone_back(2, 1)
    assert (watch.due(), watch.good, watch.healthy) == (None, 2, True)
    assert watch.judge(3, HEALTHY)[0] == {"watch/length": 0, "watch/alarms": 0, "watch/rollbacks": 1}


@pytest.mark.parametrize(
    ("changed", "due"),
    [
        (ROLLBACK, True),
        (replace(ROLLBACK, below=0.5), False),  # 1.0 is inside now
        (replace(ROLLBACK, steps=9), False),
        (replace(ROLLBACK, action="warn"), False),
        (Sign(), False),
        (replace(ROLLBACK, action="stop"), True),
    ],
)
def test_a_changed_recipe_judges_what_was_seen(changed, due):
    watch = only(length=ROLLBACK)
    judge(watch, [1.0] * 4, "trace/length_mean")
    again = only(length=changed)
    again.load_state_dict(watch.state_dict())
    assert (again.due() is not None) == due


@pytest.mark.parametrize(
    ("action", "good", "rollbacks", "key", "holds"),
    [
        ("stop", 20, 0, "watch.length.below = 4.0", ["watch.length.action=warn", "back to step 20"]),
        ("stop", None, 0, "watch.length.below = 4.0", ["watch.length.action=warn", "step 40"]),
        ("rollback", 20, 3, "watch.max_rollbacks = 3", ["watch.length.action=warn", "did not help"]),
        ("rollback", None, 0, "watch.length.action = 'rollback'", ["checkpointing.every", "no checkpoint is known"]),
    ],
)
def test_the_error_names_key_value_and_remedy(action, good, rollbacks, key, holds):
    watch = only(length=Sign(below=4.0, steps=1, action=action))
    judge(watch, [1.0], "trace/length_mean", first=40)
    error = str(CollapseError.of(watch.due(), Watch(), 40, good, rollbacks))
    assert error.startswith(f"{key}: ") and "\n" not in error and "trace/length_mean 1 is below it" in error
    assert all(part in error for part in holds)
    assert ("rollback to go back" in error) == (action == "stop" and good is not None)

"""A tiny run whose traces really shrink is warned about, stopped and rolled back; and killed in between.

At this learning rate the mean trace falls from 6 tokens below 4 within five steps, whatever the random numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nrt_megatron import checkpoints
from nrt_megatron.checkpoints import CheckpointMeta
from nrt_megatron.report import read_metrics
from tests.run import tiny
from tests.run.test_resume import assert_same_tensors, die_after
from tests.run.tiny import DISTOPT, PP, VPP

SHORT = ("checkpointing.every=2", "watch.length.steps=2", "nrt.max_num_steps=8")


def collapsing(tmp_path: Path, *overrides: str, ranks: int = 1, run: str = "run", **megatron):
    inputs = tiny.write_inputs(tmp_path)
    return tiny.recipe(inputs, *SHORT, f"run_dir={tmp_path}/{run}", *overrides, ranks=ranks, **megatron)


def told(file: Path) -> Callable[[], None]:
    """Makes the run write the lines it says to a file."""

    def before() -> None:
        from nrt_megatron.report import Progress

        def say(self: Progress, line: str) -> None:
            with file.open("a") as out:
                out.write(line + "\n")

        Progress.say = say

    return before


def steps(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run_dir)]


def test_warn_changes_nothing_and_says_it_once(tmp_path):
    off = collapsing(tmp_path, "watch.length.below=null", run="off")
    tiny.train_ranks(off, 1)
    tiny.train_ranks(collapsing(tmp_path), 1, told(tmp_path / "said"))
    said = [line for line in (tmp_path / "said").read_text().splitlines() if "watch" in line]
    assert len(said) == 1 and said[0].startswith("collapse watch: trace/length_mean ")
    rows = tiny.rows(tmp_path / "run")
    counted = [row.get("watch/length", 0) for row in rows]
    assert max(counted) >= 3 and [row.get("watch/alarms", 0) for row in rows] == [int(n >= 2) for n in counted]
    plain = [{k: v for k, v in row.items() if not k.startswith("watch/")} for row in rows]
    assert plain == [
        {k: v for k, v in row.items() if not k.startswith("watch/")} for row in tiny.rows(tmp_path / "off")
    ]


def test_stop_saves_says_why_and_goes_on_with_another_key(tmp_path):
    ranks = 2
    codes, said = tiny.work_ranks(collapsing(tmp_path, "watch.length.action=stop", ranks=ranks), ranks)
    last = steps(tmp_path / "run")[-1]
    assert codes == [2] * ranks and said.count("\n") == 1 and last < 8
    assert said.startswith("nrt: watch.length.below = 4.0: trace/length_mean ")
    assert f"watch.length.action=warn to go on from the checkpoint of step {last}, or rollback" in said
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    again = tiny.work_ranks(collapsing(tmp_path, "watch.length.action=stop", ranks=ranks), ranks)
    assert again == (codes, said), "the same command makes no step"
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    assert tiny.train_ranks(collapsing(tmp_path, ranks=ranks), ranks) == [True] * ranks
    assert steps(tmp_path / "run") == list(range(9))


def test_a_stopped_run_can_be_rolled_back(tmp_path):
    """With one checkpoint kept besides the good one."""
    few = ("checkpointing.keep_last=1", "watch.length.steps=3")
    tiny.work_ranks(collapsing(tmp_path, "watch.length.action=stop", *few), 1)
    last = steps(tmp_path / "run")[-1]
    good = CheckpointMeta.read(tmp_path / f"run/checkpoints/step_{last:08d}").progress["watch"]["good"]
    left = sorted(checkpoints.step_of(path) for path in checkpoints.newest_first(tmp_path / "run/checkpoints"))
    assert left == [good, last] and good < last - 2
    tiny.work_ranks(collapsing(tmp_path, "watch.length.action=rollback", *few), 1)
    assert json.loads((tmp_path / "run/rollbacks/1/rollback.json").read_text())["to_step"] == good


LAYOUTS = {
    "one": (1, {}),
    "dp2-distopt": (2, {DISTOPT: True}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
}
BACK = ("watch.length.action=rollback", "watch.max_rollbacks=1")


def folder(run_dir: Path) -> dict[str, object]:
    """What a rollback left, without what varies."""
    record = json.loads((run_dir / "rollbacks/1/rollback.json").read_text())
    return {
        "record": record,
        "rows": tiny.rows(run_dir / "rollbacks/1"),
        "samples": tiny.samples(run_dir / "rollbacks/1"),
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[str], Path]:
    """Run directory of a layout that has gone back once and then come to its end."""
    made: dict[str, Path] = {}

    def run(layout: str) -> Path:
        if layout not in made:
            ranks, megatron = LAYOUTS[layout]
            home = tmp_path_factory.mktemp(layout)
            assert all(tiny.train_ranks(collapsing(home, *BACK, ranks=ranks, **megatron), ranks))
            made[layout] = home / "run"
        return made[layout]

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rollback_goes_another_way(undisturbed, layout):
    run = undisturbed(layout)
    left = folder(run)
    to, from_ = left["record"]["to_step"], left["record"]["from_step"]
    assert [row["step"] for row in left["rows"]] == list(range(to + 1, from_ + 1))
    rows = tiny.rows(run)
    assert [row["step"] for row in rows] == list(range(9)), "every step stands in metrics.jsonl once"
    assert [row["watch/rollbacks"] for row in rows[1:]] == [0] * to + [1] * (8 - to)
    same = [row["step"] for row in left["rows"] if row["loss"] in [other["loss"] for other in rows[1:]]]
    assert same == [], "other questions, other traces"
    assert rows[to + 1]["lr"] == left["rows"][0]["lr"], "the schedule goes back with the weights"
    asked = {(s["step"], s["prompt"], s["traces"][0]["text"]) for s in left["samples"]}
    assert asked and not asked & {(s["step"], s["prompt"], s["traces"][0]["text"]) for s in tiny.samples(run)}


def dies(when: str) -> Callable[[], None]:
    """Makes the main rank fail at a moment of the first rollback."""

    def before() -> None:
        from nrt_megatron import output
        from nrt_megatron.run import Run

        def failing(action: Callable[..., None], first: bool) -> Callable[..., None]:
            def act(*args, **kwargs):
                if first:
                    raise RuntimeError("killed")
                action(*args, **kwargs)
                raise RuntimeError("killed")

            return act

        if when == "files cut":
            Run._continue_from = failing(Run._continue_from, True)
        else:
            output.rollbacks.write = failing(output.rollbacks.write, when == "checkpoints gone")

    return before


@pytest.mark.parametrize(
    ("layout", "moment"),
    [("one", "checkpoints gone"), ("one", "recorded"), ("one", "files cut"), ("dp2-distopt", "recorded")],
)
def test_killed_in_a_rollback(tmp_path, undisturbed, layout, moment):
    ranks, megatron = LAYOUTS[layout]
    settings = collapsing(tmp_path, *BACK, ranks=ranks, **megatron)
    with pytest.raises(AssertionError, match="killed"):
        tiny.train_ranks(settings, ranks, dies(moment))
    assert_ends_alike(settings, ranks, tmp_path / "run", undisturbed(layout))


@pytest.mark.parametrize("later", [0, 1])
def test_killed_in_an_episode(tmp_path, undisturbed, later):
    """Before the rollback with one step outside already, and after it before a checkpoint is saved."""
    record = folder(undisturbed("one"))["record"]
    settings = collapsing(tmp_path, *BACK)
    step = record["to_step"] + 1 if later else record["from_step"] - 1
    before = (lambda: die_the_second_time(step)) if later else (lambda: die_after(step))
    with pytest.raises(AssertionError, match="Crash: step"):
        tiny.train_ranks(settings, 1, before)
    assert (tmp_path / "run/rollbacks/1").exists() == bool(later)
    assert_ends_alike(settings, 1, tmp_path / "run", undisturbed("one"))


def die_the_second_time(step: int) -> None:
    from nrt_megatron.run import Run

    go_back = Run._go_back

    def gone(self: Run, *args) -> None:
        go_back(self, *args)
        die_after(step)

    Run._go_back = gone


ASYNC = ("checkpointing.async_save=true", "checkpointing.keep_last=1")


def held() -> None:
    """Nothing of a checkpoint is on the disk before the run waits for it: one is always being written."""
    from threading import Event

    from nrt_megatron.mcore import checkpoint
    from nrt_megatron.run import Run

    class Held(checkpoint._Save):
        def __init__(self, *args, **kwargs):
            self.waited_for = Event()
            super().__init__(*args, **kwargs)

        def _write(self):
            self.waited_for.wait()
            return super()._write()

        def finish(self):
            self.waited_for.set()
            super().finish()

    recover = Run._recover

    def recovering(self: Run) -> None:
        assert self._saver._save is not None, "then it would be the same as without async_save"
        recover(self)

    checkpoint._Save, Run._recover = Held, recovering


@pytest.mark.parametrize("layout", ["one", "dp2-distopt"])
def test_rolled_back_while_a_checkpoint_is_written(tmp_path, undisturbed, layout):
    ranks, megatron = LAYOUTS[layout]
    settings = collapsing(tmp_path, *BACK, *ASYNC, ranks=ranks, **megatron)
    assert_ends_alike(settings, ranks, tmp_path / "run", undisturbed(layout), held)


def test_rolled_back_when_a_checkpoint_was_just_begun(tmp_path):
    """At the first step outside, which is one that saves; the second time there is no rollback left."""
    at_once = (*BACK, "watch.length.steps=1")
    codes, said = tiny.work_ranks(collapsing(tmp_path, *at_once), 1)
    record, last = folder(tmp_path / "run")["record"], steps(tmp_path / "run")[-1]
    assert codes == [2] and record["from_step"] % 2 == 0 and record["to_step"] == record["from_step"] - 2
    assert tiny.work_ranks(collapsing(tmp_path, *at_once, *ASYNC, run="held"), 1, held) == (codes, said)
    assert_alike(tmp_path / "held", tmp_path / "run", last)


@pytest.mark.parametrize("moment", ["before", "checkpoints gone", "files cut"])
def test_killed_while_a_checkpoint_is_written(tmp_path, undisturbed, moment):
    """And then rolled back, or in the middle of that."""
    step = folder(undisturbed("one"))["record"]["from_step"]
    settings = collapsing(tmp_path, *BACK, *ASYNC)

    death = (lambda: die_after(step)) if moment == "before" else dies(moment)
    with pytest.raises(AssertionError, match=f"Crash: step {step}|killed"):
        tiny.train_ranks(settings, 1, lambda: (held(), death()))
    assert_ends_alike(settings, 1, tmp_path / "run", undisturbed("one"), held)


def assert_ends_alike(settings, ranks: int, run: Path, whole: Path, before=None) -> None:
    assert all(tiny.train_ranks(settings, ranks, before))
    assert_alike(run, whole, 8)


def assert_alike(run: Path, whole: Path, step: int) -> None:
    assert tiny.rows(run) == tiny.rows(whole) and tiny.samples(run) == tiny.samples(whole)
    assert folder(run) == folder(whole)
    assert_same_tensors(run, whole, step)


def test_without_a_checkpoint_from_before_it_stops(tmp_path):
    settings = collapsing(tmp_path, "checkpointing.every=100", "watch.length.action=rollback")
    codes, said = tiny.work_ranks(settings, 1)
    assert codes == [2] and "watch.length.action = 'rollback': no checkpoint is known to be from before" in said
    assert checkpoints.newest_whole(tmp_path / "run/checkpoints") is not None, "what was reached is saved"


def test_a_checkpoint_of_an_earlier_version_is_continued(tmp_path):
    """Its meta.json says nothing about a watch."""
    tiny.train_ranks(collapsing(tmp_path, "nrt.max_num_steps=2"), 1)
    checkpoint = tmp_path / "run/checkpoints/step_00000002"
    meta = json.loads((checkpoint / "meta.json").read_text())
    del meta["progress"]["watch"]
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    sums = checkpoints.checksums(checkpoint, checkpoints.files_of(checkpoint))
    (checkpoint / "manifest.json").write_text(json.dumps({"files": sums}))
    assert tiny.train_ranks(collapsing(tmp_path, "nrt.max_num_steps=4"), 1) == [True]
    assert steps(tmp_path / "run") == list(range(5))


def test_too_many_rollbacks_end_the_run(tmp_path):
    settings = collapsing(tmp_path, "watch.length.action=rollback", "watch.max_rollbacks=0")
    codes, said = tiny.work_ranks(settings, 1)
    assert codes == [2] and said.startswith("nrt: watch.max_rollbacks = 0: so many rollbacks did not help: ")

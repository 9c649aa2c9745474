"""Checkpoints under fire: killed while saving, full disks, damaged files, and which checkpoints are kept."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from nrt_megatron import checkpoints
from nrt_megatron.checkpoints import StorageError, damage, newest_first, newest_whole, prune, step_dir
from nrt_megatron.mcore import checkpoint, storage
from tests.run import tiny
from tests.run.test_resume import assert_same_tensors
from tests.run.tiny import TP

OPTIONS = ("checkpointing.every=2", "checkpointing.keep_last=2")
WAITS, GOES_ON = "checkpointing.async_save=false", "checkpointing.async_save=true"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happened to: checkpoints of steps 4 and 6."""
    directory = tmp_path_factory.mktemp("whole")
    tiny.train_ranks(tiny.recipe(tiny.write_inputs(directory), *OPTIONS), 1)
    return directory / "run"


@pytest.fixture
def inputs(whole, tmp_path) -> dict:
    """Of a run in `tmp_path/run` on the same files."""
    made = tiny.write_inputs(whole.parent)
    return {**made, "run_dir": str(tmp_path / "run")}


def assert_equal_runs(run: Path, whole: Path) -> None:
    assert tiny.rows(run) == tiny.rows(whole)
    assert tiny.samples(run) == tiny.samples(whole)
    assert_same_tensors(run, whole)
    assert (run / "checkpoints/latest").read_text() == "step_00000006"
    assert not list((run / "checkpoints").glob(".*"))


# --- killed while saving


def die(where: object, name: str, before: bool, call: int) -> None:
    """Makes this rank kill itself before or after the `call`-th call of a function."""
    original, calls = getattr(where, name), []

    def fatal(*args, **kwargs):
        calls.append(name)
        if before and len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(where, name, fatal)


MOMENTS: dict[str, tuple[Callable[[], None], list[str]]] = {
    "tensors not written": (partial(die, storage, "_write_common", False, 2), ["step_00000002"]),
    "second file not written": (partial(die, storage, "_write_file", True, 4), ["step_00000002"]),
    "tensors written": (partial(die, storage.StateWriter, "write", False, 2), ["step_00000002"]),
    "manifest not written": (partial(die, checkpoint, "_write_manifest", True, 2), ["step_00000002"]),
    "manifest written": (partial(die, checkpoint, "_write_manifest", False, 2), ["step_00000002"]),
    "marker not written": (partial(die, storage, "replace_text", True, 2), ["step_00000002", "step_00000004"]),
    "older ones not deleted": (
        partial(die, checkpoints, "prune", True, 3),
        ["step_00000002", "step_00000004", "step_00000006"],
    ),
    "older ones half deleted": (partial(die, shutil, "rmtree", True, 1), ["step_00000004", "step_00000006"]),
}


@pytest.mark.parametrize("saving", [WAITS, GOES_ON])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_saving(whole, inputs, tmp_path, moment, saving):
    before, left = MOMENTS[moment]
    settings = tiny.recipe(inputs, *OPTIONS, saving)
    with pytest.raises(AssertionError, match="rank 0 ended with -9"):
        tiny.train_ranks(settings, 1, before)
    found = newest_first(tmp_path / "run/checkpoints")
    assert sorted(path.name for path in found) == left
    assert all(damage(path, contents=True) is None for path in found)
    tiny.train_ranks(settings, 1)
    assert_equal_runs(tmp_path / "run", whole)


# --- damaged afterwards


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "truncated tensors": ("dist/__0_0.distcp", truncate, r"dist/__0_0.distcp has \d+ of \d+ bytes"),
    "flipped bit": ("dist/__0_1.distcp", flip_a_bit, "dist/__0_1.distcp does not match its checksum"),
    "no tensors": ("dist/__0_0.distcp", Path.unlink, "dist/__0_0.distcp is missing"),
    "no meta": ("meta.json", Path.unlink, "meta.json is missing"),
    "no tokenizer": ("tokenizer", shutil.rmtree, r"tokenizer/\S+ is missing"),
    "no manifest": ("manifest.json", Path.unlink, "manifest.json is missing"),
    "empty manifest": ("manifest.json", lambda path: path.write_text(""), "manifest.json is broken"),
    "other manifest": ("manifest.json", lambda path: path.write_text("[1]"), "manifest.json is broken"),
}


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    """A copy of the whole run."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(finished, name):
    file, harm, said = DAMAGES[name]
    latest, previous = newest_first(finished / "checkpoints")
    harm(latest / file)
    assert re.fullmatch(said, damage(latest, contents=True) or "")
    if name != "flipped bit":
        assert newest_whole(finished / "checkpoints") == previous
    harm(previous / file)
    if name != "flipped bit":
        with pytest.raises(StorageError, match=f"no checkpoint in .* is whole .of the newest, {said}.; restore one"):
            newest_whole(finished / "checkpoints")


def test_every_file_is_in_the_manifest_and_ranks_share_the_reading(finished):
    """Each of n parts looks at every n-th file, so that together they look at all."""
    (latest, _) = newest_first(finished / "checkpoints")
    for name in checkpoints.files_of(latest):
        content = (latest / name).read_bytes()
        flip_a_bit(latest / name)
        assert damage(latest) is None
        found = [damage(latest, contents=True, part=(i, 3)) for i in range(3)]
        assert sorted(finding or "" for finding in found) == ["", "", f"{name} does not match its checksum"]
        (latest / name).write_bytes(content)
    assert damage(latest, contents=True) is None


@pytest.mark.parametrize("name", ["flipped bit", "no meta"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_checkpoint_is_passed_over(whole, finished, inputs, name, ranks, capfd):
    """The run goes back to the checkpoint before, says so in one line, and ends as it did."""
    file, harm, said = DAMAGES[name]
    harm(finished / "checkpoints/step_00000006" / file)
    megatron = {TP: ranks} if ranks > 1 else {}
    assert (
        tiny.train_ranks(tiny.recipe(inputs, *OPTIONS, ranks=ranks, **megatron), ranks, say_on_file(finished))
        == [True] * ranks
    )
    line, *changed_recipe = (finished / "said").read_text().splitlines()
    assert len(changed_recipe) == (ranks > 1) and re.fullmatch(
        rf"{finished}/checkpoints/step_00000006 is damaged \({said}\); looking for an earlier one", line
    )
    if ranks == 1:
        (finished / "said").unlink()
        assert_equal_runs(finished, whole)
    else:
        assert [row["step"] for row in tiny.rows(finished)] == list(range(7))


def say_on_file(directory: Path) -> Callable[[], None]:
    """Notices of the main rank go to the file `said`."""

    def before() -> None:
        from nrt_megatron import output, run

        def say(line: str) -> None:
            with open(directory / "said", "a") as file:
                file.write(line + "\n")

        run.print_notice = output.print_notice = say

    return before


def test_without_a_whole_checkpoint_nothing_is_begun_anew(finished, inputs):
    for path in newest_first(finished / "checkpoints"):
        flip_a_bit(path / "dist/common.pt")
    codes, said = tiny.work_ranks(tiny.recipe(inputs, *OPTIONS), 1)
    assert codes == [2] and re.search(
        "no checkpoint in .* is whole .of the newest, dist/common.pt does not match", said
    )
    assert len(tiny.rows(finished)) == 7


# --- full disks


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, int], None]]:
    """Makes a directory a disk of its own of so many KiB, or changes its size."""
    mounted = set()

    def mount(place: Path, kib: int) -> None:
        mounted.add(place)
        place.mkdir(parents=True, exist_ok=True)
        options = f"{'remount,' if os.path.ismount(place) else ''}size={kib}k"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no small disk could be mounted: {done.stderr.strip()}")

    yield mount
    for place in mounted:
        if os.path.ismount(place):
            subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="module")
def whole_tp2(tmp_path_factory) -> Path:
    """A run on two ranks that nothing happened to; keeps the checkpoint of step 6 alone."""
    directory = tmp_path_factory.mktemp("whole_tp2")
    tiny.train_ranks(tiny.recipe(tiny.write_inputs(directory), *ONE_KEPT, ranks=2, **{TP: 2}), 2)
    return directory / "run"


ONE_KEPT = ("checkpointing.every=3", "checkpointing.keep_last=1")


def pages(directory: Path) -> int:
    """KiB that the files of a directory take on a small disk."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in directory.rglob("*") if path.is_file())


FULL = "cannot write a checkpoint to {}: No space left on device (ENOSPC); make room or set another run_dir"


@pytest.mark.parametrize(
    ("missing", "saving"),
    [
        ("nearly all", WAITS),
        ("half", WAITS),
        ("a tenth", WAITS),
        ("the last file", WAITS),
        ("half", GOES_ON),
        ("the last file", GOES_ON),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(whole_tp2, inputs, tmp_path, small_disk, missing, saving):
    """At whatever file the disk is full, both ranks end with the reason, and the run goes on once there is room."""
    place, one = tmp_path / "run/checkpoints", pages(whole_tp2 / "checkpoints/step_00000006")
    room = {"nearly all": 8, "half": one // 2, "a tenth": one * 9 // 10, "the last file": one}[missing]
    small_disk(place, one + room)
    settings = tiny.recipe(inputs, *ONE_KEPT, saving, ranks=2, **{TP: 2})
    codes, said = tiny.work_ranks(settings, 2)
    assert codes == [2, 2] and said.count("\n") == 1 and FULL.format(place) in said
    assert [path.name for path in newest_first(place)] == ["step_00000003"]
    assert damage(place / "step_00000003", contents=True) is None and not list(place.glob(".*"))
    small_disk(place, one * 3)
    assert tiny.train_ranks(settings, 2) == [True, True]
    assert_equal_runs(tmp_path / "run", whole_tp2)


@pytest.mark.parametrize("saving", [WAITS, GOES_ON])
def test_a_limit_on_the_size_of_files(inputs, tmp_path, saving):
    """What a quota or `ulimit -f` does; needs no privileges. A run that goes on ends at the next save at the latest."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, 100 << 10))

    codes, said = tiny.work_ranks(tiny.recipe(inputs, *OPTIONS, saving), 1, limit)
    assert codes == [2] and re.match(r"nrt: run_dir: cannot write a checkpoint to \S+: File too large \(EFBIG\);", said)
    assert newest_first(tmp_path / "run/checkpoints") == []
    assert len(tiny.rows(tmp_path / "run")) in ((3,) if saving == WAITS else (3, 4, 5))


@pytest.mark.parametrize(("kib", "rows"), [(8, 0), (16, 2)])
@pytest.mark.parametrize("tensorboard", ["false", "true"])
def test_metrics_that_cannot_be_written_end_all_ranks_alike(inputs, tmp_path, small_disk, kib, rows, tensorboard):
    """The main rank alone writes them; the others must not wait for it, nor complain that it is gone."""
    small_disk(tmp_path / "run", kib)
    settings = tiny.recipe(inputs, "checkpointing.every=6", f"logger.tensorboard={tensorboard}", ranks=2, **{TP: 2})
    codes, said = tiny.work_ranks(settings, 2)
    assert codes == [2, 2] and said.count("\n") == 1 and "No space left on device" in said
    assert len(tiny.rows(tmp_path / "run")) >= (0 if tensorboard == "true" else rows)


# --- while training goes on


def watched(log: Path) -> Callable[[], None]:
    """Lets no file of a checkpoint be written before the next step is done; notes what each step finds."""

    def before() -> None:
        from nrt_megatron.run import Run

        write, finish_step, step_done = storage._write_file, Run.finish_step, threading.Event()

        def late(*args):
            assert step_done.wait(60)
            return write(*args)

        def noting(self, metrics):
            found = [path.name for path in newest_first(self.directory / "checkpoints")]
            waiting = len(list((self.directory / "checkpoints").glob(".writing-*")))
            with log.open("a") as file:
                file.write(f"{self.step + 1}: {' '.join(found)} + {waiting}\n")
            step_done.set() if (self.step + 1) % 2 or self.step == 5 else step_done.clear()
            finish_step(self, metrics)
            while step_done.is_set() and self._saver._save is not None and not self._saver._save.written:
                time.sleep(0.01)

        storage._write_file, Run.finish_step = late, noting

    return before


def test_training_goes_on_while_a_checkpoint_is_written(whole, inputs, tmp_path):
    """Files of step 2 are written after step 3 is done, and it becomes a checkpoint then; nothing else is different."""
    tiny.train_ranks(tiny.recipe(inputs, *OPTIONS, GOES_ON), 1, watched(tmp_path / "log"))
    assert (tmp_path / "log").read_text().splitlines() == [
        "1:  + 0",
        "2:  + 0",
        "3:  + 1",
        "4: step_00000002 + 0",
        "5: step_00000002 + 1",
        "6: step_00000004 step_00000002 + 0",
    ]
    assert_equal_runs(tmp_path / "run", whole)


def test_a_run_that_ends_by_an_error_completes_its_checkpoint(inputs, tmp_path):
    """Metrics cannot be written in the step after a save."""

    def before() -> None:
        from nrt_megatron.report.jsonl import StepLog

        append = StepLog.append

        def full(self, row):
            if row["step"] == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            append(self, row)

        StepLog.append = full

    settings = tiny.recipe(inputs, *OPTIONS, GOES_ON, ranks=2, **{TP: 2})
    codes, said = tiny.work_ranks(settings, 2, before)
    assert codes == [2, 2] and said.count("\n") == 1 and "No space left on device" in said
    (path,) = newest_first(tmp_path / "run/checkpoints")
    assert path.name == (tmp_path / "run/checkpoints/latest").read_text() == "step_00000002"
    assert damage(path, contents=True) is None and not list(path.parent.glob(".*"))


# --- which are kept


def fake(directory: Path, *steps: int) -> None:
    for step in steps:
        step_dir(directory, step).mkdir(parents=True)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [
        (1, 0, [50]),
        (2, 0, [40, 50]),
        (9, 0, [10, 20, 30, 40, 50]),
        (1, 20, [20, 40, 50]),
        (2, 10, [10, 20, 30, 40, 50]),
    ],
)
def test_keep_last_and_keep_every(tmp_path, keep_last, keep_every, left):
    fake(tmp_path, 10, 20, 30, 40, 50)
    prune(tmp_path, 50, keep_last, keep_every)
    assert [checkpoints.step_of(path) for path in reversed(newest_first(tmp_path))] == left
    assert not list(tmp_path.glob(".*"))


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    """Step 60 was damaged, so that the run went back to 50; 55 is complete, and 50 must not go for 60's sake."""
    fake(tmp_path, 40, 50, 55, 60)
    prune(tmp_path, 55, 2, 0)
    assert [checkpoints.step_of(path) for path in newest_first(tmp_path)] == [55, 50]


def test_steps_are_ordered_as_numbers(tmp_path):
    fake(tmp_path, 99_999_999, 100_000_000)
    (tmp_path / "step_best").mkdir()
    (tmp_path / "step_00000001").write_text("a file")
    assert [checkpoints.step_of(path) for path in newest_first(tmp_path)] == [100_000_000, 99_999_999]


def test_older_checkpoints_go_only_when_the_newer_one_is_complete(inputs, tmp_path, monkeypatch):
    """With one to keep, the last complete one is there at any time between two saves."""
    seen = tmp_path / "seen"

    def watch() -> None:
        clean = checkpoints.clean

        def noting(directory: Path) -> None:
            whole = [path.name for path in newest_first(directory) if damage(path, contents=True) is None]
            with seen.open("a") as file:
                file.write(f"{' '.join(whole)}\n")
            clean(directory)

        checkpoints.clean = noting

    tiny.train_ranks(tiny.recipe(inputs, "checkpointing.every=2", "checkpointing.keep_last=1"), 1, watch)
    whole = [line.split() for line in seen.read_text().splitlines()]
    first = next(i for i, names in enumerate(whole) if names)
    assert first > 0 and all(whole[first:]) and whole[-1] == ["step_00000006"]
    newest = [names[0] for names in whole[first:]]
    assert newest == sorted(newest) and set(newest) == {f"step_{step:08d}" for step in (2, 4, 6)}

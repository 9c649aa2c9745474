"""Prepared directories: complete or absent, and never overwritten."""

from __future__ import annotations

import errno
import json

import pytest

from nrt_megatron.quickstart.prepared import is_prepared, make
from nrt_megatron.recipe import ConfigError

SETTINGS = {"a": 1}


def build(directory, scratch):
    (directory / "sub").mkdir()
    (directory / "sub" / "file").write_text("text")
    (scratch / "download").write_text("not kept")
    return {"loss": 0.5}


def names(directory):
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*"))


def test_a_complete_directory_with_its_record(tmp_path):
    target = tmp_path / "runs" / "made"
    assert not is_prepared(target, SETTINGS)
    make(target, SETTINGS, build)
    assert names(tmp_path) == [
        "runs",
        *(f"runs/{n}" for n in ("made", "made/PREPARED.json", "made/sub", "made/sub/file")),
    ]
    record = json.loads((target / "PREPARED.json").read_text())
    assert record["settings"] == SETTINGS and record["measured"] == {"loss": 0.5}
    assert record["files"] == {"sub/file": "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"}
    assert is_prepared(target, SETTINGS)


def test_an_interrupted_build_leaves_nothing(tmp_path):
    def interrupted(directory, scratch):
        build(directory, scratch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "made", SETTINGS, interrupted)
    assert names(tmp_path) == []


def test_the_faster_of_two_processes_wins(tmp_path):
    target = tmp_path / "made"

    def overtaken(directory, scratch):
        make(target, SETTINGS, build)
        return build(directory, scratch) | {"loss": 0.75}

    make(target, SETTINGS, overtaken)
    assert json.loads((target / "PREPARED.json").read_text())["measured"] == {"loss": 0.5}
    assert names(tmp_path) == ["made", "made/PREPARED.json", "made/sub", "made/sub/file"]


def test_a_full_disk_is_said_in_one_line(tmp_path):
    def build_on_full_disk(directory, scratch):
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    with pytest.raises(ConfigError, match=r"made cannot be made \(No space left on device\); make room"):
        make(tmp_path / "made", SETTINGS, build_on_full_disk)
    assert names(tmp_path) == []


def foreign(target):
    (target / "PREPARED.json").unlink()


def broken_record(target):
    (target / "PREPARED.json").write_text('{"files": ')


def changed(target):
    (target / "sub" / "file").write_text("edited by hand")


def removed(target):
    (target / "sub" / "file").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (foreign, "without a readable PREPARED.json"),
        (broken_record, "without a readable PREPARED.json"),
        (changed, "sub/file was changed or removed"),
        (removed, "sub/file was changed or removed"),
    ],
)
def test_what_was_touched_is_refused_and_stays(tmp_path, spoil, said):
    target = tmp_path / "made"
    make(target, SETTINGS, build)
    spoil(target)
    before = {p: p.read_bytes() for p in target.rglob("*") if p.is_file()}
    for attempt in (lambda: is_prepared(target, SETTINGS), lambda: make(target, SETTINGS, build)):
        with pytest.raises(ConfigError, match=said) as raised:
            attempt()
        assert "\n" not in str(raised.value)
    assert {p: p.read_bytes() for p in target.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_other_settings_are_refused(tmp_path):
    make(tmp_path / "made", SETTINGS, build)
    with pytest.raises(ConfigError, match="made with other settings"):
        is_prepared(tmp_path / "made", {"a": 2})

"""Input that is not what it says: one or two lines that name the file and the remedy, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nrt_megatron import cli
from nrt_megatron.convert.importer import import_hf
from nrt_megatron.recipe import ConfigError
from tests.convert.builders import save_model

SHARD = "model-00002-of-00003.safetensors"


def edit_config(**changes) -> Callable[[Path], None]:
    def edit(hf: Path) -> None:
        path = hf / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_shard(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(hf: Path) -> None:
        tensors = load_file(hf / SHARD)
        change(tensors)
        save_file(tensors, hf / SHARD, metadata={"format": "pt"})
        index = json.loads((hf / "model.safetensors.index.json").read_text())
        kept = {name: file for name, file in index["weight_map"].items() if file != SHARD}
        index["weight_map"] = {**kept, **dict.fromkeys(tensors, SHARD)}
        (hf / "model.safetensors.index.json").write_text(json.dumps(index))

    return edit


def truncate(hf: Path) -> None:
    (hf / SHARD).write_bytes((hf / SHARD).read_bytes()[:-100])


def only_pickle(hf: Path) -> None:
    for path in hf.glob("model*"):
        path.unlink()
    torch.save({}, hf / "pytorch_model.bin")


def first_name(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in tensors if part in name)


def halve(tensors: dict[str, torch.Tensor]) -> None:
    name = first_name(tensors, "down_proj")
    tensors[name] = tensors[name][:, :48].contiguous()


def as_int8(tensors: dict[str, torch.Tensor]) -> None:
    name = first_name(tensors, "down_proj")
    tensors[name] = tensors[name].to(torch.int8)


CASES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing shard": (lambda hf: (hf / SHARD).unlink(), (SHARD, "missing", "download")),
    "truncated shard": (truncate, (SHARD, "truncated", "download it again")),
    "wrong shape": (edit_shard(halve), (SHARD, "down_proj", "[64, 48]", "[64, 96]")),
    "quantised tensor": (edit_shard(as_int8), ("down_proj", "I8", "bfloat16")),
    "missing tensor": (edit_shard(lambda t: t.pop(first_name(t, "k_proj"))), ("k_proj", "missing")),
    "a bias": (
        edit_shard(lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)})),
        ("q_proj.bias", "a bias"),
    ),
    "unexpected tensor": (
        edit_shard(lambda t: t.update({"model.layers.1.self_attn.q_norm.weight": torch.zeros(8)})),
        ("q_norm.weight", "not part of a llama model"),
    ),
    "model type": (edit_config(model_type="gemma"), ("model_type", "gemma", "llama or mistral")),
    "rope scaling": (
        edit_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        ("rope_scaling.rope_type", "dynamic"),
    ),
    "pickle": (only_pickle, (".bin", "safe_serialization=True")),
    "no weights": (
        lambda hf: [path.unlink() for path in hf.glob("model*")],
        ("model.safetensors", "holds neither"),
    ),
    "broken index": (
        lambda hf: (hf / "model.safetensors.index.json").write_text("{}"),
        ("model.safetensors.index.json", "not a safetensors index"),
    ),
    "no tokenizer": (lambda hf: None, ("tokenizer.json", "--no-tokenizer")),
}


@pytest.fixture
def hf(tmp_path) -> Path:
    directory = save_model(tmp_path / "hf", "llama3", shard="260KB")
    assert (directory / SHARD).is_file()
    return directory


def nrt(*arguments: str):
    """Runs the command in this process; what `main` prints for a ConfigError is its message."""
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_before_anything_is_written(hf: Path, tmp_path: Path, case: str) -> None:
    spoil, words = CASES[case]
    spoil(hf)
    error = nrt("convert", str(hf), str(tmp_path / "out")).exception
    assert isinstance(error, ConfigError), error
    assert str(error).count("\n") <= 1 and len(str(error)) < 500
    for word in words:
        assert word in str(error)
    assert os.listdir(tmp_path) == ["hf"]


def test_exit_code_and_no_traceback(hf: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    truncate(hf)
    done = subprocess.run(
        [sys.executable, "-m", "nrt_megatron", "convert", str(hf), str(tmp_path / "out"), "--no-tokenizer"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("nrt: ") and "truncated" in done.stderr and "Traceback" not in done.stderr


def test_output_in_use_is_left_alone(hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    error = nrt("convert", str(hf), str(out), "--no-tokenizer").exception
    assert isinstance(error, ConfigError) and "not an empty directory" in str(error)
    assert (out / "precious").read_text() == "mine"
    (out / "precious").unlink()
    assert nrt("convert", str(hf), str(out), "--no-tokenizer").exit_code == 0  # an empty one is fine
    assert isinstance(nrt("export", str(out), str(hf)).exception, ConfigError)


def test_unknown_dtype_and_tokens_without_a_tokenizer(hf: Path, tmp_path: Path) -> None:
    error = nrt("convert", str(hf), str(tmp_path / "out"), "--no-tokenizer", "--dtype", "int8").exception
    assert isinstance(error, ConfigError) and "--dtype int8" in str(error)
    error = nrt("convert", str(hf), str(tmp_path / "out"), "--no-tokenizer", "--add-token", "<x>").exception
    assert isinstance(error, ConfigError) and "--no-tokenizer" in str(error)


def test_export_of_something_else(hf: Path, tmp_path: Path) -> None:
    error = nrt("export", str(hf), str(tmp_path / "out")).exception
    assert isinstance(error, ConfigError) and "a Hugging Face model already; give a checkpoint" in str(error)


def test_export_of_a_damaged_checkpoint(hf: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    import_hf(hf, checkpoint, tokenizer=False)
    data = checkpoint / "dist" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    error = nrt("export", str(checkpoint), str(tmp_path / "out")).exception
    assert isinstance(error, ConfigError) and "damaged" in str(error)
    (checkpoint / "dist" / ".metadata").unlink()
    error = nrt("export", str(checkpoint), str(tmp_path / "out")).exception
    assert isinstance(error, ConfigError) and "no complete torch_dist checkpoint" in str(error)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "hf"]


def test_export_of_a_checkpoint_whose_meta_is_of_another_model(hf: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    import_hf(hf, checkpoint, tokenizer=False)
    meta = json.loads((checkpoint / "meta.json").read_text())
    meta["model"]["intermediate_size"] = 100
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    error = nrt("export", str(checkpoint), str(tmp_path / "out")).exception
    assert isinstance(error, ConfigError) and "another model" in str(error)


def test_a_full_disk_is_said_before_the_work(hf: Path, tmp_path: Path, monkeypatch) -> None:
    import shutil

    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    error = nrt("convert", str(hf), str(tmp_path / "out"), "--no-tokenizer").exception
    assert isinstance(error, ConfigError) and "GB are free" in str(error)
    assert os.listdir(tmp_path) == ["hf"]

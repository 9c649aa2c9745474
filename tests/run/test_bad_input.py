"""Bad input through the command line: exit code 2, one or two lines with key, value and remedy, nothing touched.

Nearly all of them run in this process, where the imports are paid once; no rank may start.
"""

# ruff: noqa: E501 (a table, one case a line)

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from nrt_megatron import cli, launch, runlock
from nrt_megatron.recipe import ConfigError
from tests.data.builders import word_level, write_fast, write_jsonl
from tests.run import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """A directory with a run of six steps that is complete."""
    directory = tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        tiny.train_ranks(tiny.recipe(inputs_in(directory)), 1)
    return directory


def inputs_in(directory: Path) -> dict[str, Any]:
    """Writes the inputs; the recipe names them relative to the directory."""
    return json.loads(json.dumps(tiny.write_inputs(directory)).replace(f"{directory}/", ""))


@pytest.fixture
def place(ended, tmp_path, monkeypatch) -> Path:
    """A working directory with a copy of that run, its inputs, and the recipe it was started with."""
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(inputs_in(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def nrt(monkeypatch, capfd) -> Iterator[Callable[..., tuple[int, str]]]:
    """(exit code, stderr) of `nrt train ARGS` in this process, where it fails if ranks would start."""

    def never(*args: object) -> int:
        raise AssertionError("ranks would have been started")

    def run(*args: str) -> tuple[int, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["nrt", "train", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capfd.readouterr().err

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    monkeypatch.setattr(launch, "run", never)
    environment = dict(os.environ)
    yield run
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def tree(directory: Path) -> dict[str, str]:
    """path -> checksum of every file."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass(frozen=True)
class Case:
    """What is wrong, and what must be said: a pattern that names key or file, value, and remedy."""

    name: str
    said: str
    args: tuple[str, ...] = ()
    change: Callable[[Path], object] = lambda place: None
    recipe: str = "recipe.yaml"
    env: Mapping[str, str] = None  # type: ignore[assignment]


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Writes a file."""
    return lambda place: (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def row(**fields: Any) -> Callable[[Path], object]:
    """Adds a row to the training file, as its 33rd."""
    return lambda place: write_jsonl(
        place / "train.jsonl", [*(place / "train.jsonl").read_text().splitlines(), json.dumps(fields)]
    )


def model(**changes: Any) -> tuple[str, ...]:
    """Overrides of the inline model."""
    return tuple(f"policy.model.config.{key}={json.dumps(value)}" for key, value in changes.items())


def in_json(name: str, **changes: Any) -> Callable[[Path], object]:
    """Changes keys of a JSON file; None removes one."""

    def change(place: Path) -> None:
        content = {**json.loads((place / name).read_text()), **changes}
        (place / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def tokenizer(made: Any, config: dict[str, Any]) -> Callable[[Path], object]:
    return lambda place: write_fast(place / "tokenizer", made, config)


def parquet(**columns: list[Any]) -> Callable[[Path], object]:
    def write(place: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), place / "train.parquet")

    return write


def hugging_face(place: Path) -> None:
    """A model directory in place of the inline model."""
    from tests.mcore import tiny as models

    models.save_hf({**tiny.MODEL}, place / "hf")


def both(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda place: [change(place) for change in changes]


ELSEWHERE = "run_dir=other"
"""For what would otherwise differ from the run that is there."""
HF = ("policy.model.config=null", "policy.model.path=hf", ELSEWHERE)
MEGATRON = "policy.megatron_cfg."
WORDS = [f"w{i}" for i in range(24)]

CASES = [
    # recipes
    Case("unknown key", r"nrt\.sed = 1: unknown key .*did you mean nrt\.seed", ("nrt.sed=1",)),
    Case("wrong type", r"nrt\.seed = 'x': wrong type", ("nrt.seed=x",)),
    Case("fraction", r"nrt\.max_num_steps = 2\.5: wrong type", ("nrt.max_num_steps=2.5",)),
    Case("negative", r"policy\.optimizer\.lr = -1\.0: out of range; set a finite number above 0", ("policy.optimizer.lr=-1",)),
    Case("nan", r"policy\.optimizer\.lr = nan: out of range", ("policy.optimizer.lr=.nan",)),
    Case("unknown scheme", r"nrt\.reward_scheme = 'best': unknown value; choose log_prob", ("nrt.reward_scheme=best",)),
    Case("unknown preset", r"nrt\.preset = 'x': unknown preset; choose reference, paper", ("nrt.preset=x",)),
    Case("no value", r"nrt\.seed.*KEY=VALUE|nrt\.seed.*key=value", ("nrt.seed",)),
    Case("not yaml", r"recipe\.yaml: line 2: not valid YAML, .*correct that line", (), text("recipe.yaml", "nrt: [\n")),
    Case("not a mapping", r"recipe\.yaml.*mapping|recipe\.yaml.*section", (), text("recipe.yaml", "- nrt\n")),
    Case("object in yaml", r"recipe\.yaml.*python/object", (), text("recipe.yaml", "nrt: !!python/object/apply:os.system [ls]")),
    Case("no recipe", r"nowhere\.yaml: no such file", (), recipe="nowhere.yaml"),
    Case("no overlay", r"over\.yaml: no such file", ("--config", "over.yaml")),
    Case("K = 1", r"nrt\.num_generations_per_prompt = 1: one trace has no group .*center_reward_by = 'mean' and nrt\.scale_reward_by = 'std'.*"
         r"set 2 or more, or nrt\.center_reward_by=none nrt\.scale_reward_by=none", ("nrt.num_generations_per_prompt=1",)),
    Case("K = 1, centred", r"num_generations_per_prompt = 1: .*'mean'\): every advantage would be 0; set 2 or more, or nrt\.center_reward_by=none$",
         ("nrt.num_generations_per_prompt=1", "nrt.scale_reward_by=none")),
    Case("K = 1, scaled", r"num_generations_per_prompt = 1: one trace has no standard deviation .*or nrt\.scale_reward_by=none$",
         ("nrt.num_generations_per_prompt=1", "nrt.center_reward_by=none")),
    Case("no room for an answer", r"max_total_sequence_length = 6: a trace of .* = 6 leaves no room", ("policy.max_total_sequence_length=6",)),
    Case("no checkpoint kept", r"checkpointing\.keep_last = 0: out of range; set a finite number at least 1", ("checkpointing.keep_last=0",)),
    Case("every prompt the same", r"data\.prompt_template = 'Q': holds no \{question\}", ("data.prompt_template=Q",)),
    Case("list as marker", r"policy\.tokenizer\.marker = \['END'\]: wrong type .*; set a text, quoted .*'policy\.tokenizer\.marker=\"\[\.\.\.\]\"'",
         ("policy.tokenizer.marker=[END]",)),
    Case("several at once", r"policy\.tokenizer\.path = null: .*\n"
         r"also: cluster\.gpus_per_node = 512: this machine has \d+ GPUs; .* \| data\.train = 'x\.jsonl': no such file",
         ("policy.tokenizer.path=null", "cluster.gpus_per_node=512", "nrt.num_prompts_per_step=512",
          "policy.train_global_batch_size=1024", "data.train=x.jsonl")),
    Case("minimal", r"data\.train = '\?\?\?': must be set; add data\.train=FILE\nalso: policy\.tokenizer\.path = null.* \| policy\.max_total",
         (), text("recipe.yaml", yaml.safe_dump({"policy": {"model": {"config": tiny.MODEL}}}))),
    # layouts
    Case("TP and heads", rf"{MEGATRON}tensor_model_parallel_size = 3: does not divide num_attention_heads = 4.*set 1, 2 or 4",
         (f"{MEGATRON}tensor_model_parallel_size=3", "cluster.cpu_ranks=3")),
    Case("TP and ranks", r"tensor_model_parallel_size = 4: 2 ranks cannot be split.*set", (f"{MEGATRON}tensor_model_parallel_size=4", "cluster.cpu_ranks=2")),
    Case("PP and layers", r"pipeline_model_parallel_size = 3: does not divide num_hidden_layers = 4", (f"{MEGATRON}pipeline_model_parallel_size=3", "cluster.cpu_ranks=3")),
    Case("batch", r"policy\.train_global_batch_size = 3: 4 prompts x 2 traces = 8 sequences .*set", ("policy.train_global_batch_size=3",)),
    Case("micro-batch", r"policy\.train_micro_batch_size = 3: does not divide", ("policy.train_micro_batch_size=3",)),
    Case("nodes", r"cluster\.num_nodes = 2: ranks are started on this machine alone", ("cluster.num_nodes=2", "cluster.cpu_ranks=2")),
    Case("other number of ranks", r"cluster\.cpu_ranks = 1: 4 ranks were started \(WORLD_SIZE\)", env={"RANK": "0", "WORLD_SIZE": "4"}),
    # data
    Case("wrong fields", r"data\.train = 'train\.jsonl': row 32 .*no 'question' and no 'answer', and no 'messages'; the row has 'prompt', 'response'; "
         r"set data\.question_key and data\.answer_key to names that are there", (), row(prompt="w1", response="w2")),
    Case("wrong columns", r"data\.train = 'train\.parquet': no 'question' .* among its columns prompt, response; set data\.question_key and",
         ("data.train=train.parquet", ELSEWHERE), parquet(prompt=["w1"], response=["w2"])),
    Case("no data, before anything is prepared", r"data\.train = 'x\.jsonl': no such file", ("prepare=tiny_sum", "data.train=x.jsonl")),
    Case("prepared by another recipe", r"data\.train = 'runs/tiny-sum/train\.jsonl': no such file.*; nrt train recipes/nrt-tiny-1n0g-cpu\.yaml makes it",
         ("data.train=runs/tiny-sum/train.jsonl",)),
    Case("not fetched", r"policy\.model\.path = 'runs/smollm2/base': no such directory.*; make smollm2, or tools/fetch_smollm2\.py, fetches it",
         ("policy.model.config=null", "policy.model.path=runs/smollm2/base", ELSEWHERE)),
    Case("no data", r"data\.train = 'x\.jsonl': no such file", ("data.train=x.jsonl",)),
    Case("data is a directory", r"data\.train = 'tokenizer': is a directory", ("data.train=tokenizer",)),
    Case("no validation", r"data\.validation = 'x\.jsonl': no such file", ("data.validation=x.jsonl",)),
    Case("empty data", r"data\.train = 'train\.jsonl': .*no rows|empty", (), text("train.jsonl", "")),
    Case("malformed row", r"train\.jsonl.*(line|row) 33", (), both(row(), lambda p: text("train.jsonl", (p / "train.jsonl").read_text().replace("{}", "{"))(p))),
    Case("row is a list", r"train\.jsonl.*(line|row) 1\b", (), text("train.jsonl", "[1]\n")),
    Case("no question", r"train\.jsonl.*(line|row) 33.*question", (), row(answer="w1")),
    Case("empty answer", r"train\.jsonl.*(line|row) 33.*answer.*empty|train\.jsonl.*(line|row) 33.*empty.*answer", (), row(question="w1", answer=" ")),
    Case("answer is a number", r"train\.jsonl.*(line|row) 33.*answer", (), row(question="w1", answer=3)),
    Case("not utf-8", r"train\.jsonl.*line 1.*utf-8.*on_bad_row=drop", (), text("train.jsonl", b'{"question": "\xff", "answer": "w1"}\n')),
    Case("broken parquet", r"data\.train = 'x\.parquet'.*[Pp]arquet", ("data.train=x.parquet",), text("x.parquet", "PAR1 and no more")),
    Case("parquet without answers", r"train\.parquet.*answer", ("data.train=train.parquet", ELSEWHERE), parquet(question=["w1"])),
    Case("prompts too long everywhere", r"data\.train = 'train\.jsonl'.*(no row|every row|all).*(max_prompt_tokens|limit)", ("data.max_prompt_tokens=2",)),
    Case("broken validation row", r"validation\.jsonl.*(line|row) 1\b", (), text("validation.jsonl", "{}\n")),
    # tokenizer
    Case("no tokenizer", r"policy\.tokenizer\.path = 'x': no such directory", ("policy.tokenizer.path=x",)),
    Case("broken tokenizer", r"tokenizer.*tokenizer\.json", (), text("tokenizer/tokenizer.json", "{")),
    Case("no EOS", r"policy\.tokenizer\.path = 'tokenizer'.*no EOS; set eos_token", (), text("tokenizer/tokenizer_config.json", "{}")),
    Case("EOS is not there", r"eos_token '<end>' is not in the vocabulary", (), text("tokenizer/tokenizer_config.json", '{"eos_token": "<end>"}')),
    Case("marker of several tokens", r"policy\.tokenizer\.marker = 'w1 w2'.*2 tokens.*(add_marker|require_single_token_marker)", ("policy.tokenizer.marker=w1 w2",)),
    Case("unknown marker", r"policy\.tokenizer\.marker = '<end of thought>'.*add_marker", ("policy.tokenizer.marker=<end of thought>",)),
    Case("tokenizer of another model", r"policy\.tokenizer.*104 tokens.*vocab_size.*30.*tokenizer that belongs", (),
         tokenizer(word_level(["<unk>", "think", *[f"w{i}" for i in range(100)]]), {"eos_token": "</s>"})),
    Case("chat without template", r"data\.prompt_template = 'chat'.*template", ("data.prompt_template=chat",)),
    # models
    Case("no hidden size", r"policy\.model\.config\.hidden_size: missing in the model's config; add it", model(hidden_size=None)),
    Case("other family", r"policy\.model\.config\.model_type: 'qwen2' is not supported; use a model of type llama or mistral", model(model_type="qwen2")),
    Case("unknown rope", r"policy\.model\.config\.rope_scaling\.rope_type: 'yarn' is not supported; use default or llama3", ('policy.model.config.rope_scaling={rope_type: yarn, factor: 2.0}',)),
    Case("more positions", r"policy\.max_total_sequence_length = 128: beyond max_position_embeddings = 64.*set at most 64", ("policy.max_total_sequence_length=128",)),
    Case("no model directory", r"policy\.model\.path = 'hf': no such directory", HF),
    Case("no config", r"policy\.model\.path = 'hf': holds no config\.json", HF, lambda p: (p / "hf").mkdir()),
    Case("broken config", r"policy\.model\.path = 'hf': config\.json is not what it should be.*restore the file", HF, both(hugging_face, text("hf/config.json", "{"))),
    Case("no weights", r"policy\.model\.path = 'hf': hf: holds neither model\.safetensors .*give a directory with the model's weights", HF, both(hugging_face, lambda p: (p / "hf/model.safetensors").unlink())),
    Case("truncated weights", r"policy\.model\.path = 'hf': hf/model\.safetensors: truncated .*download it again", HF, both(hugging_face, lambda p: os.truncate(p / "hf/model.safetensors", 5000))),
    Case("weights of another shape", r"policy\.model\.path = 'hf': .*gate_proj.weight has shape \[64, 32\], config\.json says \[128, 32\]; put", HF, both(hugging_face, in_json("hf/config.json", intermediate_size=128))),
    # runs and checkpoints
    Case("run_dir is a file", r"run_dir = 'recipe\.yaml': recipe\.yaml is a file", ("run_dir=recipe.yaml",)),
    Case("run_dir below a file", r"run_dir = 'recipe\.yaml/run': \S+recipe\.yaml is a file; set another directory", ("run_dir=recipe.yaml/run",)),
    Case("another model", r"run_dir.*another model \(num_layers 4, policy\.model has 2\).*another run_dir", model(num_hidden_layers=2)),
    Case("another data file", r"data\.train = 'train\.jsonl': the run was started on another file \(32 rows.*start a new run_dir", (), row(question="w1", answer="w2")),
    Case("another seed", r"nrt\.seed = 7: the run was started with 1234", ("nrt.seed=7",)),
    Case("another order", r"data\.shuffle = false: the run was started with true; set that, or start a new run_dir", ("data.shuffle=false",)),
    Case("another precision", r"policy\.megatron_cfg\.bf16 = true: the run was started with false", (f"{MEGATRON}bf16=true",)),
    Case("fewer steps", r"nrt\.max_num_steps = 5: the run in run has done 6 steps; set at least 6", ("nrt.max_num_steps=5",)),
    Case("complete, another scheme", r"run_dir = 'run': its run has done all 6 steps, without nrt\.reward_scheme 'geometric_mean' -> 'prob'; "
         r"set another run_dir, or a higher nrt\.max_num_steps", ("nrt.reward_scheme=prob",)),
    Case("complete, several keys", r"without policy\.optimizer\.lr 0\.01 -> 0\.02, evaluation\.num_questions 4 -> 2; set another run_dir",
         ("evaluation.num_questions=2", "policy.optimizer.lr=0.02")),
    Case("complete, inline model", r"without policy\.model\.config\.initializer_range 0\.2 -> 0\.1; set", model(initializer_range=0.1)),
    Case("complete, FP8", r"without policy\.megatron_cfg\.fp8 null -> 'e4m3'",
         (f"{MEGATRON}fp8=e4m3", f"{MEGATRON}fp8_recipe=blockwise", f"{MEGATRON}fp8_emulation=true")),
    Case("broken metrics", r"run/metrics\.jsonl line 1 is no metrics row", (), text("run/metrics.jsonl", "?\n")),
    Case("broken samples", r"run/samples\.jsonl line 1 is no", (), text("run/samples.jsonl", "?\n")),
    Case("no checkpoint is whole", r"run_dir: no checkpoint in run/checkpoints is whole \(of the newest, dist/__0_0\.distcp has", (),
         lambda p: [os.truncate(path, 10) for path in p.glob("run/checkpoints/*/dist/__0_0.distcp")]),
    Case("other format", r"meta\.json: format 'nrt-megatron/9' is not 'nrt-megatron/1'", (), lambda p: new_format(p)),
    Case("checkpoint as model, damaged", r"policy\.model\.path = 'run/checkpoints/step_00000006'.*damaged.*__0_0\.distcp",
         ("policy.model.config=null", "policy.model.path=run/checkpoints/step_00000006", ELSEWHERE),
         lambda p: os.truncate(p / "run/checkpoints/step_00000006/dist/__0_0.distcp", 10)),
]  # fmt: skip


def new_format(place: Path) -> None:
    """Checkpoints of a later version: whole, but not for this program."""
    from nrt_megatron.checkpoints import MANIFEST, checksums, files_of

    for path in place.glob("run/checkpoints/step_*"):
        in_json("meta.json", format="nrt-megatron/9")(path)
        (path / MANIFEST).write_text(json.dumps({"files": checksums(path, files_of(path))}))


def test_a_run_directory_in_use(place, nrt, monkeypatch):
    """Of another process: two runs in one directory would destroy each other."""
    monkeypatch.setattr(runlock, "PATIENCE_S", 0.2)
    with runlock.hold(place / "run"):
        before = tree(place)
        code, said = nrt("recipe.yaml")
        assert code == 2 and said.count("\n") == 1
        assert re.match(
            rf"nrt: run_dir = 'run': in use by process {os.getpid()} on \S+; wait until it has ended, or set", said
        )
        with pytest.raises(ConfigError, match="in use by process"):
            runlock.hold(place / "run")
        assert tree(place) == before
    with pytest.raises(AssertionError, match="ranks would have been started"):
        nrt("recipe.yaml")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(place, nrt, case, monkeypatch):
    case.change(place)
    for key, value in (case.env or {}).items():
        monkeypatch.setenv(key, value)
    before = tree(place)
    code, said = nrt(case.recipe, *case.args)
    print(f"{case.name}: {said}", end="")
    assert code == 2 and said.startswith("nrt: ") and said.count("\n") <= 2, said
    assert re.search(case.said, said), said
    assert tree(place) == before


def test_the_same_recipe_is_accepted(place, nrt):
    """The cases above differ from a good one by what they name alone."""
    with pytest.raises(AssertionError, match="ranks would have been started"):
        nrt("recipe.yaml")


@pytest.mark.parametrize(
    "args",
    [
        ("nrt.reward_scheme=prob", "nrt.max_num_steps=8"),
        (f"{MEGATRON}tensor_model_parallel_size=2", "cluster.cpu_ranks=2", "policy.train_micro_batch_size=2"),
        ("logger.samples_every=1", "checkpointing.keep_last=1", f"{MEGATRON}logprob_chunk_size=64"),
        (
            "nrt.num_generations_per_prompt=1",
            "nrt.center_reward_by=none",
            "nrt.scale_reward_by=none",
            "nrt.max_num_steps=7",
        ),
    ],
)
def test_what_may_change_of_a_complete_run(place, nrt, args):
    with pytest.raises(AssertionError, match="ranks would have been started"):
        nrt("recipe.yaml", *args)


def test_a_vocabulary_that_no_token_fills_is_said(place, nrt, capfd):
    with pytest.raises(AssertionError, match="ranks would have been started"):
        nrt("recipe.yaml", *model(vocab_size=32000), ELSEWHERE)
    said = capfd.readouterr().err
    assert (
        said.startswith("nrt: policy.model.config.vocab_size = 32000: the tokenizer has 28 tokens; ")
        and said.count("\n") == 1
    )


def test_a_run_in_place_of_a_checkpoint(place):
    from nrt_megatron.mcore.convert_checkpoint import export_to_hf

    with pytest.raises(
        ConfigError, match=r"^run/meta\.json: not readable; give a checkpoint, such as run/checkpoints/step_00000006$"
    ):
        export_to_hf("run", "release")
    assert not (place / "release").exists()


# --- as a command


def command(place: Path, *args: str) -> tuple[int, str]:
    """(exit code, stderr) of a real `nrt train`."""
    env = {**{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "nrt_megatron", "train", "recipe.yaml", *args],
        cwd=place, env=env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["unknown key", "TP and heads", "malformed row", "no EOS", "another model"])
def test_bad_input_of_a_command(place, name):
    (case,) = (case for case in CASES if case.name == name)
    case.change(place)
    before = tree(place)
    code, said = command(place, *case.args)
    assert code == 2 and said.startswith("nrt: ") and said.count("\n") == 1 and re.search(case.said, said), said
    assert tree(place) == before


def test_a_full_disk_of_a_command(place):
    """Two ranks, a disk that holds one checkpoint: one line, exit code 2, and the checkpoint that was there is whole."""
    from nrt_megatron.checkpoints import damage

    checkpoints = place / "run/checkpoints"
    (checkpoints / "step_00000006").rename(place / "aside")
    (checkpoints / "step_00000003").rename(place / "kept")
    size = sum(-(-path.stat().st_size // 4096) * 4 for path in (place / "kept").rglob("*") if path.is_file())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}k", "tmpfs", str(checkpoints)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no small disk could be mounted: {mounted.stderr.strip()}")
    try:
        shutil.move(place / "kept", checkpoints / "step_00000003")
        code, said = command(place, "cluster.cpu_ranks=2", f"{MEGATRON}tensor_model_parallel_size=2")
        changed, said = said.splitlines()
        assert code == 2 and changed.startswith(
            "nrt: from step 4 on: policy.megatron_cfg.tensor_model_parallel_size 1 -> 2"
        )
        assert re.match(
            r"nrt: run_dir: cannot write a checkpoint to run/checkpoints: No space left on device \(ENOSPC\); make room",
            said,
        )
        assert damage(checkpoints / "step_00000003", contents=True) is None
    finally:
        subprocess.run(["umount", str(checkpoints)], check=True)

"""`nrt` as users call it: help, dry run, mistakes, and ranks that end together. Training itself is stubbed out."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nrt_megatron import launch
from nrt_megatron.recipe import ConfigError, from_yaml, load_recipe

ROOT = Path(__file__).parents[1]
RECIPE = """
nrt: {num_prompts_per_step: 8, num_generations_per_prompt: 4, max_num_steps: 3}
policy:
  model: {path: model}
  train_global_batch_size: 16
  max_total_sequence_length: 64
  generation: {max_new_tokens: 16}
data: {train: train.jsonl}
cluster: {gpus_per_node: 0, cpu_ranks: 2}
"""
STUBS = """
import os, signal, sys, time, types

def main(recipe_yaml):
    rank = os.environ.get("RANK", "alone")
    with open(f"started.{rank}", "w") as file:
        file.write(" ".join([str(os.getpid()), os.environ.get("WORLD_SIZE", ""), os.environ["OMP_NUM_THREADS"]]))
    %s

def preflight(recipe):
    pass

for name, function in (("worker", main), ("preflight", preflight)):
    module = types.ModuleType("nrt_megatron." + name)
    setattr(module, name if name == "preflight" else "main", function)
    sys.modules[module.__name__] = module
"""
"""`sitecustomize.py` of every process below: rank and checks of files stand still, the launcher is the real one."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working directory with a recipe and the files it names."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    return tmp_path


def start(place: Path, *args: str, rank_does: str = "return 0", **env: str) -> subprocess.Popen[str]:
    """`nrt ARGS` in `place`, every rank running the line `rank_does`."""
    stubs = place / "stubs"
    stubs.mkdir(exist_ok=True)
    (stubs / "sitecustomize.py").write_text(STUBS % rank_does)
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-m", "nrt_megatron", *args],
        cwd=place,
        env={**inherited, "PYTHONPATH": f"{stubs}{os.pathsep}{ROOT}", "TMPDIR": str(stubs), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def nrt(place: Path, *args: str, rank_does: str = "return 0", **env: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `nrt ARGS`."""
    process = start(place, *args, rank_does=rank_does, **env)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    return process.returncode, out, err


def test_help_takes_less_than_a_second_and_imports_nothing_heavy(place):
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        code, out, _ = nrt(place, "--help")
        times.append(time.perf_counter() - begin)
        assert code == 0 and "train" in out
    assert min(times) < 1.0
    heavy = "{'torch', 'transformers', 'megatron', 'omegaconf', 'numpy'}"
    code = f"import sys, nrt_megatron.cli; sys.exit(str({heavy} & {{m.split('.')[0] for m in sys.modules}} or ''))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stderr.strip() == ""


def test_version(place):
    code, out, _ = nrt(place, "--version")
    assert code == 0 and out.startswith("nrt-megatron ")


def test_dry_run_prints_the_resolved_recipe_and_stops(place):
    (place / "over.yaml").write_text("nrt: {seed: 5}")
    code, out, err = nrt(place, "train", "recipe.yaml", "nrt.preset=paper", "--config", "over.yaml", "--dry-run")
    recipe = from_yaml(out)
    assert (code, err) == (0, "")
    assert (recipe.nrt.seed, recipe.nrt.clip_to_baseline, recipe.run_dir) == (5, True, "runs/recipe")
    assert not (place / "runs").exists() and not list(place.glob("started.*"))


def test_dry_run_says_what_is_not_on_this_machine(place):
    code, out, err = nrt(place, "train", "recipe.yaml", "data.train=elsewhere.jsonl", "--dry-run")
    assert code == 0 and from_yaml(out).data.train == "elsewhere.jsonl"
    assert err.startswith("nrt: not on this machine yet: data.train = 'elsewhere.jsonl'") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["recipe.yaml", "nrt.sed=1"], "nrt.sed = 1: unknown key (command line); did you mean nrt.seed?"),
        (["recipe.yaml", "nrt.seed=x"], "nrt.seed = 'x': wrong type"),
        (
            ["recipe.yaml", "policy.megatron_cfg.tensor_model_parallel_size=3"],
            "tensor_model_parallel_size = 3: 2 ranks",
        ),
        (
            ["recipe.yaml", "nrt.num_generations_per_prompt=1", "policy.train_global_batch_size=8"],
            "or nrt.center_reward_by=none nrt.scale_reward_by=none",
        ),
        (["recipe.yaml", "data.train=nowhere.jsonl"], "data.train = 'nowhere.jsonl': no such file"),
        (["recipe.yaml", "policy.model.path=nowhere"], "policy.model.path = 'nowhere': no such directory"),
        (["recipe.yaml", "prepare=nothing"], "prepare = 'nothing': unknown preparation; choose tiny_sum"),
        (["recipe.yaml", "prepare=nothing", "--dry-run"], "prepare = 'nothing'"),
        (["recipe.yaml", "run_dir=train.jsonl"], "run_dir = 'train.jsonl': train.jsonl is a file"),
        (
            ["recipe.yaml", "cluster.num_nodes=2"],
            "cluster.num_nodes = 2: ranks are started on this machine alone",
        ),
        (["recipe.yaml", "--config", "none.yaml"], "recipe none.yaml: no such file"),
        (["recpe.yaml"], "did you mean recipe.yaml?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(place, args, expected):
    run_dir = place / "runs/recipe"
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("before\n")
    files = sorted(path for path in place.rglob("*") if "stubs" not in path.parts)
    code, out, err = nrt(place, "train", *args)
    assert (code, out) == (2, "")
    assert expected in err and err.startswith("nrt: ") and err.count("\n") == 1
    assert sorted(path for path in place.rglob("*") if "stubs" not in path.parts) == files
    assert (run_dir / "metrics.jsonl").read_text() == "before\n"


@pytest.mark.parametrize("args", [["train"], ["trian", "recipe.yaml"], ["train", "recipe.yaml", "--dryrun"]])
def test_usage_errors_have_exit_code_2(place, args):
    code, out, err = nrt(place, *args)
    assert (code, out) == (2, "") and "Error" in err


def test_gpus_that_are_not_there(place, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    recipe = load_recipe(place / "recipe.yaml", [], ["cluster.gpus_per_node=8"])
    with pytest.raises(
        ConfigError, match=r"this machine has 0 GPUs; set cluster.gpus_per_node=0 and cluster.cpu_ranks"
    ):
        launch.check_ranks(recipe, {})
    launch.check_ranks(recipe, {"RANK": "3", "WORLD_SIZE": "8"})  # torchrun's machines are torchrun's business


def test_two_ranks_start_and_end(place):
    code, out, err = nrt(place, "train", "recipe.yaml", OMP_NUM_THREADS="3")
    assert (code, out, err) == (0, "", "")
    assert [(place / f"started.{rank}").read_text().split()[1:] for rank in (0, 1)] == [["2", "3"]] * 2


def test_threads_of_cpu_ranks(place, monkeypatch):
    recipe, env = load_recipe(place / "recipe.yaml"), {"OMP_NUM_THREADS": "3"}
    launch.prepare_environment(recipe, env)
    assert env == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE", "NRT_DEVICE": "cpu"}


def test_environment_of_gpu_ranks(place):
    """One queue where Megatron overlaps a tensor-parallel exchange with a product; the user has the last word."""

    def prepared(*overrides: str, **env: str) -> dict[str, str]:
        launch.prepare_environment(load_recipe(place / "recipe.yaml", [], ["cluster.gpus_per_node=8", *overrides]), env)
        return env

    memory = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert prepared() == memory
    for key in ("tensor", "context"):
        sizes = f"policy.megatron_cfg.{key}_model_parallel_size=2".replace("context_model", "context")
        assert prepared(sizes) == {**memory, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        assert prepared(sizes, CUDA_DEVICE_MAX_CONNECTIONS="32")["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"


def test_one_rank_runs_in_the_process_itself(place):
    process = start(place, "train", "recipe.yaml", "cluster.cpu_ranks=1")
    assert process.wait(timeout=120) == 0
    assert (place / "started.alone").read_text().split()[0] == str(process.pid)


def test_a_rank_that_found_a_mistake_decides_the_exit_code_and_nothing_is_added(place):
    says = "print('nrt: bad row', file=sys.stderr) if rank == '0' else time.sleep(60); return 2"
    assert nrt(place, "train", "recipe.yaml", rank_does=says) == (2, "", "nrt: bad row\n")


def test_a_failed_rank_is_named(place):
    fails = "time.sleep(0 if rank == '1' else 60); return 3"
    assert nrt(place, "train", "recipe.yaml", rank_does=fails) == (
        1,
        "",
        "nrt: rank 1 ended with exit code 3\n",
    )
    killed = "time.sleep(0 if rank == '0' else 60); os.kill(os.getpid(), signal.SIGKILL)"
    line = "nrt: rank 0 was killed by SIGKILL (out of memory?)\n"
    assert nrt(place, "train", "recipe.yaml", rank_does=killed) == (1, "", line)


@pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL of the parent ends the ranks on Linux alone")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_its_launcher(place, sent):
    process = start(place, "train", "recipe.yaml", rank_does="time.sleep(60)")
    ranks = []
    for rank in (0, 1):
        wait_for(lambda rank=rank: (place / f"started.{rank}").exists() and (place / f"started.{rank}").read_text())
        ranks.append(psutil.Process(int((place / f"started.{rank}").read_text().split()[0])))
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    if sent is signal.SIGKILL:
        assert process.returncode == -sent
    elif sent is signal.SIGTERM:  # asks ranks to checkpoint; these know nothing of it
        line = "nrt: asked to stop before the run had started; the same command starts it\n"
        assert (process.returncode, err) == (75, line)
    else:
        begins = "no checkpoint has been written, the same command begins anew"
        assert (process.returncode, err) == (128 + sent, f"nrt: ended by {sent.name}, all ranks with it; {begins}\n")
    wait_for(lambda: not any(is_alive(rank) for rank in ranks))


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_interrupted_run_names_its_last_checkpoint(place, ranks):
    for step in (3, 12, 9):
        (place / f"runs/recipe/checkpoints/step_{step:08d}").mkdir(parents=True)
    process = start(place, "train", "recipe.yaml", f"cluster.cpu_ranks={ranks}", rank_does="time.sleep(60)")
    wait_for(lambda: len(list(place.glob("started.*"))) == ranks)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    said = "nrt: ended by SIGINT(, all ranks with it)?; the last checkpoint is runs/recipe/checkpoints/step_00000012, "
    assert process.returncode == 130 and re.fullmatch(f"{said}the same command goes on from there\n", err), err


def test_the_default_of_a_missing_gpu_is_named(place, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    recipe = load_recipe(place / "recipe.yaml", [], ["cluster.gpus_per_node=8"])
    with pytest.raises(ConfigError, match=r"cluster.gpus_per_node = 8, its default: this machine has 0 GPUs; set"):
        launch.check_ranks(recipe, {})


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_ranks_of_torchrun_are_joined_and_one_of_them_speaks(place):
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert nrt(place, "train", "recipe.yaml", RANK="1", **world)[0] == 0
    assert (place / "started.1").exists()
    wrong = ("train", "recipe.yaml", "nrt.sed=1", "trainer.max_steps=3")
    assert nrt(place, *wrong, RANK="1", **world) == (2, "", "")
    code, _, err = nrt(place, *wrong, RANK="0", **world)
    assert code == 2 and "did you mean nrt.seed" in err
    code, _, err = nrt(place, "train", "recipe.yaml", RANK="0", WORLD_SIZE="4")
    assert code == 2 and "cluster.cpu_ranks = 2: 4 ranks were started (WORLD_SIZE); set them to 4" in err


def test_ranks_of_srun_get_the_variables_of_torchrun():
    step = {
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_STEP_NODELIST": "gpu[008-009]",
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "2",
    }
    env = dict(step)
    launch.adopt_slurm(env)
    added = {key: value for key, value in env.items() if key not in step}
    assert added == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "MASTER_ADDR": "gpu008",
        "MASTER_PORT": str(15000 + 77 * 31 + 2),
    }
    assert not launch.is_first_rank(env)


@pytest.mark.parametrize(
    "env",
    [
        {},
        {
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "16",
            "SLURM_JOB_NODELIST": "gpu[1-2]",
        },  # a batch script, outside srun
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "RANK": "5", "WORLD_SIZE": "16"},  # srun torchrun
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_without_a_step_of_several_tasks_nothing_is_joined(env):
    before = dict(env)
    launch.adopt_slurm(env)
    assert env == before


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[008-011,020],login", "gpu008"),
        ("a[3,5]b", "a3b"),
        ("x-y01.z", "x-y01.z"),
    ],
)
def test_first_host(nodelist, first):
    assert launch.first_host(nodelist) == first

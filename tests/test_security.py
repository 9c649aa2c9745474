"""Nothing that comes with a model, a recipe or a checkpoint runs: the sources say so, and hostile files are fed in."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from nrt_megatron import checkpoints
from nrt_megatron.convert.dcp_metadata import read_metadata
from nrt_megatron.mcore.convert_checkpoint import convert_hf_to_megatron, export_to_hf
from nrt_megatron.recipe import ConfigError, load_recipe
from tests.mcore import tiny as models
from tests.run import tiny

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "nrt_megatron").rglob("*.py"), *(ROOT / "tools").glob("*.py")])


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.fixture
def canary(tmp_path) -> Path:
    """What hostile files make when something in them runs. That they would is tested below."""
    return tmp_path / "pwned"


# --- what the sources call


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> object:
    """The constant that a call passes under a name; `...` for what is no constant, None where it passes nothing."""
    found = [k.value for k in call.keywords if k.arg == name]
    return None if not found else getattr(found[0], "value", ...)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_never_called(path):
    for name, call in calls(path):
        where, last = f"{path.name}:{call.lineno}: {name}", name.rpartition(".")[2]
        assert name not in ("eval", "exec", "os.system", "os.popen", "__import__", "compile"), where
        assert name not in ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load"), where
        assert last not in ("Unpickler", "_Unpickler") or path.name == "dcp_metadata.py", where
        assert keyword(call, "shell") in (None, False) and keyword(call, "allow_pickle") in (None, False), where
        if name == "torch.load":
            assert keyword(call, "weights_only") is True, where
        if last == "from_pretrained":
            assert keyword(call, "trust_remote_code") is False, where
            assert "Model" not in name or keyword(call, "use_safetensors") is True, where


def test_the_sources_are_looked_at(tmp_path):
    """The test above fails where it should."""
    bad = tmp_path / "bad.py"
    for line in (
        "pickle.load(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=flag)",
        "subprocess.run('ls', shell=True)",
        "AutoTokenizer.from_pretrained(d)",
        "AutoModel.from_pretrained(d, trust_remote_code=False)",
        "os.system('ls')",
        "yaml.load(f)",
    ):
        bad.write_text(line)
        with pytest.raises(AssertionError):
            test_what_is_never_called(bad)


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_evaluate_nothing(script):
    words = [
        word for line in script.read_text().splitlines() if not line.lstrip().startswith("#") for word in line.split()
    ]
    assert "eval" not in words and 'bash -c "' not in " ".join(words)


# --- pickles


def test_every_load_of_torch_is_of_weights_only(canary, tmp_path):
    """Also those of libraries that ask for more: Megatron's reader of objects does."""
    torch.save({"x": Evil(canary)}, tmp_path / "x.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Evil(canary)))
    assert canary.is_dir(), "a hostile file that is let in would be noticed"


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """A Hugging Face directory with one small model."""
    directory = tmp_path_factory.mktemp("hf") / "model"
    models.save_hf({**tiny.MODEL}, directory)
    return directory


@pytest.fixture(scope="module")
def converted(hf, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "checkpoint"
    convert_hf_to_megatron(hf, target, tokenizer=False)
    return target


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_of_hugging_face_are_refused(hf, tmp_path, canary, name):
    """As a `.bin`, and under the name of a safetensors file."""
    model = shutil.copytree(hf, tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Evil(canary)}, model / name)
    with pytest.raises(ConfigError) as refused:
        convert_hf_to_megatron(model, tmp_path / "out", tokenizer=False)
    assert len(str(refused.value).splitlines()) <= 2
    assert not canary.exists() and not (tmp_path / "out").exists()


def test_code_beside_a_model_does_not_run(hf, tmp_path, canary):
    """`auto_map` in the configs of model and tokenizer, while transformers is asked for both."""
    model = shutil.copytree(hf, tmp_path / "model")
    code = f"import os\nos.mkdir({str(canary)!r})\nclass Model: ...\nclass Config: ...\nclass Tokenizer: ...\n"
    (model / "evil.py").write_text(code)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (model / "config.json").write_text(json.dumps(config))
    shutil.copytree(tiny_tokenizer(tmp_path), model, dirs_exist_ok=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "nrt_megatron", "convert", str(model), str(tmp_path / "out"), "--verify"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and "verified on" in done.stderr, done.stderr
    assert not canary.exists()


def tiny_tokenizer(directory: Path) -> Path:
    tiny.write_inputs(directory)
    return directory / "tokenizer"


def hostile_metadata(dist: Path, canary: Path) -> None:
    (dist / ".metadata").write_bytes(pickle.dumps(Evil(canary)))


def hostile_inside(dist: Path, canary: Path) -> None:
    """In a real metadata, where its unpickler has accepted everything before."""
    metadata = pickle.loads((dist / ".metadata").read_bytes())
    metadata.planner_data = Evil(canary)
    (dist / ".metadata").write_bytes(pickle.dumps(metadata))


def dotted(dist: Path, canary: Path) -> None:
    """A name below an allowed one."""
    inner = f"cnrt_x\ny\n(S'{canary}'\ntR.".replace("nrt_x\ny", "torch.distributed.checkpoint.metadata\nos.mkdir")
    (dist / ".metadata").write_bytes(b"\x80\x04" + inner.encode())


def elsewhere(dist: Path, canary: Path) -> None:
    """Tensors in a file outside the checkpoint."""
    metadata = pickle.loads((dist / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = f"../{info.relative_path}"
    (dist / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("attack", [hostile_metadata, hostile_inside, dotted, elsewhere])
def test_a_checkpoint_someone_sent(converted, tmp_path, canary, attack):
    """Refused by export and before a run starts, and nothing in it has run."""
    checkpoint = shutil.copytree(converted, tmp_path / "checkpoint")
    attack(checkpoint / "dist", canary)
    for use in (lambda: read_metadata(checkpoint / "dist"), lambda: export_to_hf(checkpoint, tmp_path / "out")):
        with pytest.raises(ConfigError, match=r"\.metadata: (not the metadata of a checkpoint|names a file outside)"):
            use()
    from nrt_megatron.preflight import preflight

    recipe = of_checkpoint(tmp_path, checkpoint)
    with pytest.raises(ConfigError, match=rf"policy\.model\.path = '{checkpoint}': .*\.metadata"):
        preflight(recipe)
    assert not canary.exists() and not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


def of_checkpoint(directory: Path, checkpoint: Path):
    inputs = tiny.write_inputs(directory)
    return tiny.recipe(inputs, "policy.model.config=null", f"policy.model.path={checkpoint}", "nrt.max_num_steps=1")


def hostile_common(dist: Path, canary: Path) -> None:
    torch.save({"optimizer": Evil(canary)}, dist / "common.pt")


def hostile_object(dist: Path, canary: Path) -> None:
    """An object among the tensors, where Megatron keeps the state of FP8."""
    metadata = pickle.loads((dist / ".metadata").read_bytes())
    buffer = io.BytesIO()
    torch.save([Evil(canary)], buffer)
    (dist / "__9_0.distcp").write_bytes(buffer.getvalue())
    for index, info in metadata.storage_data.items():
        if "_extra_state" in index.fqn:
            info.relative_path, info.offset, info.length = "__9_0.distcp", 0, len(buffer.getvalue())
    (dist / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("attack", [hostile_common, hostile_object])
def test_what_megatron_reads_itself_runs_nothing(converted, tmp_path, canary, attack):
    checkpoint = shutil.copytree(converted, tmp_path / "checkpoint")
    attack(checkpoint / "dist", canary)
    with pytest.raises(AssertionError, match=r"[Ww]eights.?only|Unpickling|pickle"):
        tiny.train_ranks(of_checkpoint(tmp_path, checkpoint), 1)
    assert not canary.exists()


# --- recipes


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"]
)
def test_yaml_makes_no_objects(tmp_path, canary, tag):
    (tmp_path / "r.yaml").write_text(f"nrt: {{seed: {tag} [{canary}]}}\n")
    (tmp_path / "good.yaml").write_text("data: {train: x}\n")
    for arguments in ((tmp_path / "r.yaml",), (tmp_path / "good.yaml", [tmp_path / "r.yaml"])):
        with pytest.raises(ConfigError, match="could not determine a constructor"):
            load_recipe(*arguments)
    with pytest.raises(ConfigError):
        load_recipe(tmp_path / "good.yaml", [], [f"nrt.seed={tag} [{canary}]"])
    assert not canary.exists()


def test_resolvers_read_keys_and_the_environment_and_no_more(tmp_path, monkeypatch):
    """`${oc.env:X}` stands in recipes for clusters; OmegaConf's other resolvers copy, pick and parse values."""
    from omegaconf.basecontainer import BaseContainer

    path = tmp_path / "r.yaml"
    path.write_text("data: {train: '${oc.env:NRT_SCRATCH}/x.jsonl'}\n")
    monkeypatch.setenv("NRT_SCRATCH", "/scratch")
    assert load_recipe(path).data.train == "/scratch/x.jsonl"
    assert all(name.startswith("oc.") for name in BaseContainer._resolvers)
    with pytest.raises(ConfigError, match="Unsupported interpolation type eval"):
        load_recipe(path, [], ["run_dir=${eval:1}"])


# --- paths


def test_a_run_writes_below_its_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    settings = tiny.recipe(tiny.write_inputs(tmp_path), "nrt.max_num_steps=1")
    before = set(tmp_path.rglob("*"))
    tiny.train_ranks(settings, 1)
    made = set(tmp_path.rglob("*")) - before
    assert made and all(path.is_relative_to(tmp_path / "run") for path in made)
    assert not any(path.is_symlink() for path in made)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "dist/../../secret"])
def test_a_manifest_names_no_files_outside(tmp_path, name):
    checkpoint = tmp_path / "step_00000001"
    checkpoint.mkdir()
    (tmp_path / "secret").write_text("x")
    (checkpoint / checkpoints.MANIFEST).write_text(json.dumps({"files": {name: [1, 0]}}))
    assert checkpoints.damage(checkpoint, contents=True) == "manifest.json names files outside the checkpoint"


@pytest.mark.parametrize("name", ["step_../../x", "step_x", "step_-1", "step_1.5"])
def test_a_checkpoint_is_named_by_its_step(tmp_path, name):
    (tmp_path / "a/b" / name).mkdir(parents=True)
    assert checkpoints.newest_first(tmp_path / "a/b") == []


def test_an_index_names_no_weights_outside(hf, tmp_path):
    model = shutil.copytree(hf, tmp_path / "model")
    (model / "model.safetensors").rename(tmp_path / "outside.safetensors")
    weights = {"model.embed_tokens.weight": "../outside.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(ConfigError, match="missing"):
        convert_hf_to_megatron(model, tmp_path / "out", tokenizer=False)


# --- endpoints


def listening(process: psutil.Process) -> set[str]:
    """Addresses on which a process and those below it wait for connections."""
    family = [process, *process.children(recursive=True)]
    return {c.laddr.ip for p in family for c in p.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="another name of the loopback interface")
def test_ranks_of_one_machine_listen_on_loopback_alone(tmp_path):
    tiny.recipe(tiny.write_inputs(tmp_path), "nrt.max_num_steps=2000", ranks=2, tensor_model_parallel_size=2)
    overrides = ["cluster.cpu_ranks=2", "policy.megatron_cfg.tensor_model_parallel_size=2", "nrt.max_num_steps=2000"]
    env = {**{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nrt_megatron", "train", str(tmp_path / "recipe.yaml"), *overrides]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        try:
            deadline = time.monotonic() + 200
            while not (tmp_path / "run/metrics.jsonl").exists() and run.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
            assert listening(psutil.Process(run.pid)) == {"127.0.0.1"}
        finally:
            run.terminate()
            run.wait(timeout=100)

"""`nrt convert` and `nrt export`: the same bits back, added tokens, and nothing left behind when it fails."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nrt_megatron.checkpoints import CheckpointMeta, is_checkpoint
from nrt_megatron.convert import importer, vocabulary
from nrt_megatron.convert.exporter import export_hf
from nrt_megatron.convert.importer import import_hf
from nrt_megatron.mcore.convert_checkpoint import convert_hf_to_megatron, export_to_hf
from nrt_megatron.recipe import ConfigError
from tests.convert.builders import (
    VARIANTS,
    VOCAB,
    assert_identical,
    save_model,
    save_sentencepiece,
    save_tokenizer,
    tensors,
)
from tests.distributed import run_ranks

MARKER = "<|response_start|>"


def config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def logits(directory: Path, text: str = "What is the use of a book?") -> torch.Tensor:
    """Of the token after `text`, float32 [v]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory).eval()(ids).logits[0, -1]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_there_and_back_gives_the_same_bits_and_config(tmp_path, monkeypatch, variant: str, dtype: str) -> None:
    monkeypatch.setattr(importer, "PIECE_BYTES", 1000)  # several pieces per matrix
    hf = save_model(tmp_path / "hf", variant, dtype=getattr(torch, dtype), shard="40KB")
    import_hf(hf, tmp_path / "checkpoint", tokenizer=False)
    export_hf(tmp_path / "checkpoint", tmp_path / "back", max_shard_size="40KB")
    assert len(list(hf.glob("*.safetensors"))) > 3
    assert_identical(tensors(hf), tensors(tmp_path / "back"))
    assert config(hf) == config(tmp_path / "back")
    theirs, ours = (json.loads((d / "model.safetensors.index.json").read_text()) for d in (hf, tmp_path / "back"))
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"] == theirs["metadata"]


def test_a_cast_is_the_one_of_torch_and_is_recorded(tmp_path) -> None:
    hf = save_model(tmp_path / "hf", "llama3")
    import_hf(hf, tmp_path / "checkpoint", tokenizer=False, dtype="bfloat16")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_identical({k: v.bfloat16() for k, v in tensors(hf).items()}, tensors(tmp_path / "back"))
    assert {**config(hf), "dtype": "bfloat16"} == config(tmp_path / "back")


def test_stacked_layers_of_different_dtypes_need_a_dtype(tmp_path) -> None:
    hf = save_model(tmp_path / "hf", "llama3")
    weights = load_file(hf / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] = weights["model.layers.2.mlp.up_proj.weight"].bfloat16()
    save_file(weights, hf / "model.safetensors")
    with pytest.raises(ConfigError, match=r"linear_fc1\.weight is bfloat16 and float32; pass --dtype"):
        import_hf(hf, tmp_path / "checkpoint", tokenizer=False)


def test_a_trained_checkpoint_is_released_in_the_dtype_of_its_matrices(tmp_path) -> None:
    """Megatron's local layers keep norms in float32 beside bfloat16 matrices."""
    hf = save_model(tmp_path / "hf", "llama3", dtype=torch.bfloat16)
    weights = {k: v.float() if "norm" in k else v for k, v in load_file(hf / "model.safetensors").items()}
    save_file(weights, hf / "model.safetensors")
    import_hf(hf, tmp_path / "checkpoint", tokenizer=False)
    export_hf(tmp_path / "checkpoint", tmp_path / "mixed")
    assert_identical(weights, tensors(tmp_path / "mixed"))
    meta = json.loads((tmp_path / "checkpoint/meta.json").read_text())
    (tmp_path / "checkpoint/meta.json").write_text(json.dumps({**meta, "kind": "train"}))
    export_hf(tmp_path / "checkpoint", tmp_path / "trained")
    assert_identical({k: v.bfloat16() for k, v in weights.items()}, tensors(tmp_path / "trained"))


def verified(hf: Path, root: Path, **options) -> list[str]:
    """Converts and exports with `--verify`, in a rank of its own; what it printed about the proofs."""

    def both() -> str:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            convert_hf_to_megatron(hf, root / "checkpoint", verify=True, **options)
            export_to_hf(root / "checkpoint", root / "back", verify=True)
        return said.getvalue()

    (said,) = run_ranks(1, both)
    return [line for line in said.splitlines() if "verif" in line]


@pytest.mark.parametrize("variant", ["llama3.2", "mistral"])
def test_proof_passes_and_notices_one_wrong_weight(tmp_path, variant: str) -> None:
    from nrt_megatron.mcore.verify import verify

    hf = save_tokenizer(save_model(tmp_path / "hf", variant, dtype=torch.bfloat16))
    for dtype in (None, "float32"):
        lines = verified(hf, tmp_path / str(dtype), dtype=dtype)
        assert len(lines) == 2 and all(line.startswith("verified on 5") for line in lines), lines

    name, back = "model.layers.1.self_attn.k_proj.weight", tmp_path / "None" / "back"
    weights = load_file(back / "model.safetensors")
    weights[name][0, 0] += 1
    save_file(weights, back / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match=r"ConfigError: verify: .* are not the same model"):
        run_ranks(1, verify, tmp_path / "None" / "checkpoint", back)


def test_proof_without_a_tokenizer_says_what_it_compares_on(tmp_path) -> None:
    hf = save_model(tmp_path / "hf", "llama3")
    lines = verified(hf, tmp_path, tokenizer=False)
    assert [line.startswith("verify: no tokenizer") for line in lines] == [True, False, True, False]


@pytest.mark.parametrize("variant", ["llama3.2", "mistral"])  # tied, untied
@pytest.mark.parametrize("init", ["eos", "mean", "white rabbit"])
def test_added_token_starts_where_its_init_says(tmp_path, variant: str, init: str) -> None:
    hf = save_tokenizer(save_model(tmp_path / "hf", variant, vocab_size=300))
    assert len(verified(hf, tmp_path, add_token=[MARKER], init_from=init)) == 2

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    marker = tokenizer.convert_tokens_to_ids(MARKER)
    assert marker == 300 and tokenizer.encode(MARKER, add_special_tokens=False) == [300]
    assert config(tmp_path / "back")["vocab_size"] == 301
    record = json.loads((tmp_path / "checkpoint/meta.json").read_text())["added_tokens"]
    assert record == [{"text": MARKER, "id": 300, "init": init}]

    before, after = logits(hf), logits(tmp_path / "back")
    assert torch.allclose(before, after[:300], atol=1e-6)
    like = {"eos": [1], "mean": list(range(300))}.get(init) or tokenizer.encode(init, add_special_tokens=False)
    # The logit is linear in the output row; with an untied or a tied matrix alike.
    assert torch.allclose(after[marker], before[like].mean(), atol=1e-5)
    if init == "mean":  # Jensen: not above the average probability
        assert after.softmax(-1)[marker] <= 1 / 300
    changed = tensors(tmp_path / "back")
    for name, tensor in tensors(hf).items():
        assert torch.equal(changed[name][: len(tensor)], tensor), name


def test_both_matrices_of_an_untied_model_get_the_row(tmp_path) -> None:
    hf = save_tokenizer(save_model(tmp_path / "hf", "llama3", vocab_size=300))
    import_hf(hf, tmp_path / "checkpoint", add_token=[MARKER, "<|two|>"], init_from="eos")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    source, result = tensors(hf), tensors(tmp_path / "back")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(result[name][300:], source[name][[1, 1]])


def test_a_token_that_exists_is_not_added_again(tmp_path) -> None:
    hf = save_tokenizer(save_model(tmp_path / "hf", "llama3"))
    with pytest.raises(ConfigError, match=r"--add-token '<s>': .*already.*id 0"):
        import_hf(hf, tmp_path / "checkpoint", add_token=["<s>"])
    with pytest.raises(ConfigError, match=r"--add-token '</s>': .*\n.*ends generation"):
        import_hf(hf, tmp_path / "checkpoint", add_token=["</s>"])
    assert os.listdir(tmp_path) == ["hf"]


def test_sentencepiece_tokenizer_is_carried_and_extended(tmp_path) -> None:
    hf = save_sentencepiece(save_model(tmp_path / "hf", "llama2", vocab_size=380))
    import_hf(hf, tmp_path / "plain")
    assert (tmp_path / "plain/tokenizer/tokenizer.model").read_bytes() == (hf / "tokenizer.model").read_bytes()
    import_hf(hf, tmp_path / "added", add_token=[MARKER])
    export_hf(tmp_path / "added", tmp_path / "back")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    ids = tokenizer.encode(f"yes{MARKER}", add_special_tokens=False)
    assert ids[-1] == json.loads((tmp_path / "added/meta.json").read_text())["added_tokens"][0]["id"]
    assert config(tmp_path / "back")["vocab_size"] == ids[-1] + 1 == 381


def test_a_failed_check_leaves_nothing(tmp_path) -> None:
    hf = save_model(tmp_path / "hf", "llama3")

    def refuse(directory: Path) -> None:
        assert is_checkpoint(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_hf(hf, tmp_path / "checkpoint", tokenizer=False, check=refuse)
    assert os.listdir(tmp_path) == ["hf"]


def test_a_killed_conversion_leaves_nothing_that_loads(tmp_path) -> None:
    hf = save_model(tmp_path / "hf", "llama3")
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from nrt_megatron.convert.importer import import_hf\n"
        "def progress(done, total):\n"
        "    if done > total / 2: print('half', flush=True); time.sleep(60)\n"
        "import_hf(Path(sys.argv[1]), Path(sys.argv[2]), tokenizer=False, progress=progress)\n"
    )
    command = [sys.executable, "-c", code, str(hf), str(tmp_path / "checkpoint")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    (partial,) = (path for path in tmp_path.iterdir() if path.name != "hf")
    assert partial.name.startswith(".checkpoint.partial")
    with pytest.raises(ConfigError):
        CheckpointMeta.read(partial)
    with pytest.raises(ConfigError):
        export_hf(tmp_path / "checkpoint", tmp_path / "back")
    import_hf(hf, tmp_path / "checkpoint", tokenizer=False)  # and the way is free


def test_memory_of_a_mean_does_not_grow_with_the_vocabulary(tmp_path, monkeypatch) -> None:
    """The same row whatever the chunk, up to the order of float64 sums."""
    from nrt_megatron.convert.safetensors_io import HFWeights

    weights = HFWeights(save_model(tmp_path / "hf", "llama3"))
    new = vocabulary.NewTokens((VOCAB,), base_size=VOCAB)
    whole = vocabulary.initial_row(weights, "lm_head.weight", new)
    monkeypatch.setattr(vocabulary, "_CHUNK_BYTES", 5000)
    assert torch.allclose(vocabulary.initial_row(weights, "lm_head.weight", new), whole, rtol=1e-6)

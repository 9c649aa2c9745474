"""The quickstart's base model: a small Llama and its tokenizer, trained for seconds on traces of mixed quality."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nrt_megatron.quickstart.tiny_sum import (
    EOS,
    LEAD_WORDS,
    MARKER,
    PAD,
    STYLES,
    TRACE_OPEN,
    Row,
    Settings,
    draw_style,
    rows,
    trace,
)

POSITIONS = 128
"""Context length; a question with the longest trace and its answer takes 34."""
IGNORED = -100
"""Label of a token without a loss (transformers' convention)."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Digits, trace letters and `=` by the character, lead words whole, and special tokens.

    The special tokens are no words of the model underneath, so text that looks like one does not become one
    when it is encoded with special tokens off. Anything else cannot be encoded at all: there is no unknown token.
    """
    words = [*"0123456789=", *filter(None, STYLES.values()), *LEAD_WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(LEAD_WORDS) + r"|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[TRACE_OPEN, MARKER],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=POSITIONS,
    )


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights in float32, drawn without touching the global random state."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config)


class Encoder:
    """Rows and their traces to padded batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._ids = tokenizer.get_vocab()
        self._pad = tokenizer.pad_token_id

    def batch(self, samples: list[tuple[Row, str]]) -> tuple[Tensor, Tensor]:
        """(tokens, labels), int64 [B, S]: labels are the tokens themselves, not shifted, IGNORED in the prompt
        and in the padding."""
        tokens, labels = [], []
        for row, written in samples:
            lead, digit = row.answer.split("=")
            prompt = [self._ids[t] for t in (*row.question, TRACE_OPEN)]
            rest = [self._ids[t] for t in (*written, MARKER, lead, "=", digit, EOS)]
            tokens.append(torch.tensor(prompt + rest))
            labels.append(torch.tensor([IGNORED] * len(prompt) + rest))
        pad_sequence = torch.nn.utils.rnn.pad_sequence
        return (
            pad_sequence(tokens, batch_first=True, padding_value=self._pad),
            pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        )


def train(model: LlamaForCausalLM, encoder: Encoder, settings: Settings) -> float:
    """Trains in place and returns the last loss. Every sequence is new; held-out questions never appear."""
    rng = Random(f"base {settings.seed}")
    stream = rows(settings, rng, held_out=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    columns = (TextColumn("prepare: base model"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        task = progress.add_task("", total=settings.steps, loss=float("nan"))
        for step in range(settings.steps):
            samples = []
            for row in islice(stream, settings.sequences_per_step):
                samples.append((row, trace(row.question, draw_style(settings, step, rng), rng)))
            tokens, labels = encoder.batch(samples)
            # Padding is on the right and carries no loss, so the causal mask alone keeps it out.
            loss = model(input_ids=tokens, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            progress.update(task, advance=1, loss=loss.item())
    return loss.item()


@torch.no_grad()
def accuracy_given_sums(model: LlamaForCausalLM, encoder: Encoder, questions: list[Row]) -> float:
    """Share of questions whose digit is the most likely one behind a correct trace of running sums."""
    rng = Random(0)
    tokens, _ = encoder.batch([(row, trace(row.question, "sums", rng)) for row in questions])  # [B, S]
    logits = model(input_ids=tokens).logits
    # All sequences have the same length: ... = digit <eos>. The digit is the last token but one.
    return (logits[:, -3].argmax(-1) == tokens[:, -2]).double().mean().item()


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums come out in another order, and so in other bits, with another number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def build(directory: Path, settings: Settings, validation: list[Row]) -> dict[str, Any]:
    """Writes a Hugging Face directory; returns the last loss and the accuracy behind a correct trace."""
    tokenizer = build_tokenizer()
    encoder = Encoder(tokenizer)
    with one_thread():
        model = build_model(settings, tokenizer)
        loss = train(model, encoder, settings)
        accuracy = accuracy_given_sums(model, encoder, validation)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return {"loss": loss, "accuracy_given_sums": accuracy}

"""Built-in preparations: what a recipe's `prepare:` key makes before training, without any download.

`tiny_sum` makes `runs/tiny-sum/`: a small base model and question-answer rows for one task, the sum of twelve
digits modulo ten. Adding twelve numbers does not fit into one token of a two-layer model, so a trace really
carries the computation. The base model knows how to write and to use running sums and seldom does; NRT has to
find out that they pay. It selects a style of trace here, it does not discover one.

A sequence `x | z | m | y*` in characters (lead words are one token each):

    314104220113<think>s348993577892</think>so=2<eos>     running sums, the last one is the answer
    314104220113<think></think>hence=2<eos>               the empty trace

Recipe values that go with it:

    prepare: tiny_sum
    policy.model.path: runs/tiny-sum/base
    policy.tokenizer: {trace_open: "<think>", marker: "</think>"}      both are special tokens already
    policy.generation.max_new_tokens: 16                              a running-sum trace has 13 tokens
    data: {train: runs/tiny-sum/train.jsonl, validation: runs/tiny-sum/validation.jsonl,
           prompt_template: "{question}"}
    evaluation.match: "after:="                                       lead words are random, the digit counts
    policy.megatron_cfg.tensor_model_parallel_size: 1 or 2            there are 2 key-value heads
"""

from __future__ import annotations

from pathlib import Path

from nrt_megatron.recipe import ConfigError

PREPARATIONS = ("tiny_sum",)
_DIRECTORIES = {"tiny_sum": "tiny-sum"}


def directory_of(name: str | None, root: str | Path = "runs") -> Path | None:
    """What `prepare(name, root)` makes; None for no preparation and an unknown one."""
    return Path(root) / _DIRECTORIES[name] if name in _DIRECTORIES else None


def check_name(name: str | None) -> None:
    """Raises ConfigError for a name that stands for no preparation; None stands for none."""
    if name is not None and name not in PREPARATIONS:
        raise ConfigError.at("prepare", name, "unknown preparation", f"choose {', '.join(PREPARATIONS)} or null")


def prepare(name: str, root: str | Path = "runs") -> None:
    """Makes what `name` stands for under `root`; does nothing when it is already there, and says which.

    Same settings, same bytes: one torch thread, no global random state read or changed. Raises ConfigError for
    an unknown name, and when the directory in question was not made by this function or was changed since.
    """
    check_name(name)
    from nrt_megatron.quickstart import tiny_sum

    target = directory_of(name, root)
    assert target is not None
    tiny_sum.prepare(target, tiny_sum.Settings())

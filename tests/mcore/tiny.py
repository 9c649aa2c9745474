"""Tiny models and sequences shared by the Megatron tests."""

from __future__ import annotations

from pathlib import Path

import torch

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.data.batch import SequenceGrid
from nrt_megatron.mcore import runtime
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.objective.loss import ANSWER, FORMAT, NONE, TRACE
from nrt_megatron.recipe import Megatron, Optimizer, Policy, Recipe, Scheduler

VOCAB = 100
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
MISTRAL = {k: v for k, v in LLAMA.items() if k != "rope_scaling"} | {
    "model_type": "mistral",
    "sliding_window": 7,
    "head_dim": 16,
    "tie_word_embeddings": False,
}


def save_hf(config: dict, directory: Path, seed: int = 0) -> Path:
    """A transformers model with weights large enough that mistakes show."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return directory


def recipe(*, mbs: int = 1, **megatron) -> Recipe:
    """A recipe whose policy section is what the tests need."""
    return Recipe(
        policy=Policy(
            train_micro_batch_size=mbs,
            megatron_cfg=Megatron(make_vocab_size_divisible_by=8, **megatron),
            # Adam divides by |g|: with a small epsilon an entry whose gradient is rounding would move at random.
            optimizer=Optimizer(lr=1e-2, adam_eps=1e-5),
            scheduler=Scheduler(lr_warmup_fraction=0.0),
        )
    )


def policy(directory: Path, settings: Recipe) -> MegatronPolicy:
    """Joins the ranks and builds a trainable policy from a Hugging Face directory."""
    place = runtime.initialize(settings)
    shape = ModelShape.from_dir(directory)
    built = MegatronPolicy(place, settings.policy, shape, num_updates=10)
    built.load(directory, shape)
    built.prepare_for_training()
    return built


def grid(num_sequences: int = 8, seed: int = 3, traces: int = 4) -> SequenceGrid:
    """Random sequences x | z | m | y* of differing lengths, some with a forced marker, some ended by EOS.

    Every `traces` neighbours share their prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    x = 0
    for i in range(num_sequences):
        drawn, z, y = (int(torch.randint(lo, hi, (1,), generator=generator)) for lo, hi in ((3, 7), (0, 9), (2, 6)))
        x = x if i % traces else drawn
        kinds = [NONE] * x + [TRACE] * z + [TRACE if i % 2 else FORMAT] + [ANSWER] * y
        rows.append((x, z, kinds))
    width = max(len(r[2]) for r in rows)
    N = num_sequences

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = torch.randint(0, VOCAB, (N, width), generator=generator)
    for i, (x, _, _) in enumerate(rows):
        tokens[i, :x] = tokens[i - i % traces, :x]
    kind = torch.tensor([r[2] + [NONE] * (width - len(r[2])) for r in rows])
    return SequenceGrid(
        tokens=tokens,
        lengths=torch.tensor([len(r[2]) for r in rows]),
        prompt_lengths=torch.tensor([r[0] for r in rows]),
        trace_lengths=torch.tensor([r[1] for r in rows]),
        kind=kind,
        old_log_probs=-noise(N, width).abs() - 4,
        advantages=noise(N),
        token_signal=torch.where(kind == ANSWER, noise(N, width).abs(), 0.0),
        eos_ended=torch.arange(N) % 4 == 0,
        eos_ids=torch.full((N,), 2),
        eos_log_probs=-noise(N).abs() - 4,
    )

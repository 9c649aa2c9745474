"""Proof of a conversion: the Megatron model and transformers give the same logits on real text."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from torch import Tensor

from nrt_megatron.checkpoints import CheckpointMeta
from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.dcp_metadata import read_metadata
from nrt_megatron.convert.sample_text import SAMPLE_TEXT
from nrt_megatron.convert.tokenizer_files import VOCABULARIES
from nrt_megatron.mcore import runtime
from nrt_megatron.mcore.model import build_chunks
from nrt_megatron.recipe import ConfigError, Recipe

LOGIT_BOUND = 1e-4
"""Largest difference of a logit, in float32."""
KL_BOUND = 1e-6
"""Largest mean KL divergence per position, in nats."""


ARGMAX_BOUND = 0.99
"""Smallest share of positions with the same most likely token; rounding may swap two that are as good as equal."""


@dataclass(frozen=True)
class Comparison:
    """How far two models' logits are apart on the same tokens."""

    tokens: int
    max_difference: float
    argmax_agreement: float
    """Share of positions with the same most likely token."""
    kl: float
    """Mean over positions of KL(transformers || Megatron), nats."""

    @property
    def passed(self) -> bool:
        return self.max_difference <= LOGIT_BOUND and self.kl <= KL_BOUND and self.argmax_agreement >= ARGMAX_BOUND

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens: largest logit difference {self.max_difference:.2e} (bound {LOGIT_BOUND:.0e}), "
            f"same argmax {self.argmax_agreement:.2%} (bound {ARGMAX_BOUND:.0%}), KL {self.kl:.2e} nats "
            f"(bound {KL_BOUND:.0e})"
        )


def verify(checkpoint: Path, hf_dir: Path, dtype: str | None = None) -> Comparison:
    """Compares the two models in float32 on one process, one after the other in memory.

    Weights of both are rounded to `dtype` first, where the conversion did so to one of them. Raises
    ConfigError when a bound is exceeded. Where the tokenizer is missing, or does not know the sample text,
    its bytes serve as token ids, and a line says so.
    """
    shape = ModelShape.from_hf(CheckpointMeta.read(checkpoint).model)
    ids = sample_ids(hf_dir, ModelShape.from_dir(hf_dir))
    comparison = compare(transformers_logits(hf_dir, ids, dtype), megatron_logits(checkpoint, shape, ids, dtype))
    if not comparison.passed:
        raise ConfigError(f"verify: {checkpoint} and {hf_dir} are not the same model.\n{comparison}")
    return comparison


def compare(theirs: Tensor, ours: Tensor) -> Comparison:
    """Logits [s, v] of transformers and [s, v' >= v] of Megatron: rows added or padded beyond v are left out."""
    ours = ours[:, : theirs.shape[1]]
    kl = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    return Comparison(
        tokens=len(theirs),
        max_difference=float((ours - theirs).abs().max()),
        argmax_agreement=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        kl=float(kl),
    )


def sample_ids(hf_dir: Path, shape: ModelShape) -> Tensor:
    """Token ids int64 [s] of the sample text, at most as many as the model has positions."""
    if any((hf_dir / name).is_file() for name in VOCABULARIES):
        from transformers import AutoTokenizer

        try:
            ids = AutoTokenizer.from_pretrained(hf_dir, trust_remote_code=False)(SAMPLE_TEXT)["input_ids"]
            return torch.tensor(ids[: shape.max_position_embeddings])
        except Exception as error:  # the tokenizers library raises bare Exceptions for a closed vocabulary
            reason = f"the tokenizer does not take the sample text ({error})"
    else:
        reason = "no tokenizer"
    print(f"verify: {reason}: comparing on its bytes as token ids", file=sys.stderr)
    ids = [byte % shape.vocab_size for byte in SAMPLE_TEXT.encode()]
    return torch.tensor(ids[: shape.max_position_embeddings])


@torch.no_grad()
def transformers_logits(hf_dir: Path, ids: Tensor, dtype: str | None = None) -> Tensor:
    """float32 [s, v]"""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(hf_dir, use_safetensors=True, trust_remote_code=False).float().eval()
    _round(model, dtype)
    return model(ids[None]).logits[0]


@torch.no_grad()
def megatron_logits(checkpoint: Path, shape: ModelShape, ids: Tensor, dtype: str | None = None) -> Tensor:
    """float32 [s, padded v] of the checkpoint's weights on one rank, through Megatron's own loading."""
    read_metadata(checkpoint / "dist")
    with _alone() as cfg:
        (model,) = build_chunks(shape, replace(cfg, transformer_impl="local"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, on every checkpoint of Megatron
            state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint / "dist"))
        model.load_state_dict(state["model"])
        _round(model, dtype)
        device = next(model.parameters()).device
        positions = torch.arange(len(ids), device=device)[None]
        return model.eval()(ids[None].to(device), positions, None)[0].float().cpu()


def _round(model: torch.nn.Module, dtype: str | None) -> None:
    """Rounds the parameters to `dtype`, in place and still in float32."""
    if dtype:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))


@contextmanager
def _alone() -> Iterator:
    """Megatron's groups for this process by itself."""
    recipe = Recipe()
    runtime.initialize(recipe)
    try:
        yield recipe.policy.megatron_cfg
    finally:
        runtime.shutdown()

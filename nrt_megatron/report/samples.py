"""samples.jsonl: a few prompts with their traces, for reading and for seeing what the rewards are made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from nrt_megatron.report.jsonl import StepLog

if TYPE_CHECKING:
    from nrt_megatron.data.tokenizer import Tokenizer
    from nrt_megatron.scoring import Scored

SAMPLES_FILE = "samples.jsonl"
FINISH = ("marker", "eos", "length")
"""How a trace ended, by the code of `data.traces`."""


@dataclass(frozen=True)
class TraceSample:
    """One trace and what it was worth."""

    text: str
    ids: list[int]
    """As sampled, without marker and end token."""
    finish: str
    """`marker`: the policy closed the trace; `eos`: it ended the sequence; `length`: cut at the limit."""
    reward: Optional[float]
    """None where the value is not finite."""
    advantage: Optional[float]
    c: list[Optional[float]]
    """pi(y*_i | x, z, m, y*_<i) of each answer token."""


@dataclass(frozen=True)
class PromptSample:
    """One line of samples.jsonl."""

    step: int
    index: int
    """Row of the question in the training file, from 0."""
    prompt: str
    """As the model sees it, special tokens shown."""
    answer: str
    """The reference."""
    answer_tokens: list[str]
    """The reference token by token, end of sequence included; what c and b refer to."""
    b: list[Optional[float]]
    """pi(y*_i | x, m, y*_<i): after the empty trace."""
    traces: list[TraceSample]


def samples_of(scored: Scored, tokenizer: Tokenizer, step: int, num_prompts: int) -> list[PromptSample]:
    """The first `num_prompts` prompts of a step, with all their K traces."""
    generated = scored.rollout.generated
    K = generated.finish.size(1)
    samples = []
    for g, example in enumerate(scored.rollout.examples[:num_prompts]):
        width = len(example.answer_ids)
        rows = slice(g * K, (g + 1) * K)
        traces = zip(
            generated.trace_ids[g].tolist(),
            generated.finish[g].tolist(),
            scored.rewards[rows].tolist(),
            scored.advantages[rows].tolist(),
            scored.log_c[rows, :width].exp().tolist(),
            strict=True,
        )
        samples.append(
            PromptSample(
                step=step,
                index=example.index,
                prompt=tokenizer.decode(list(example.prompt_ids)),
                answer=example.answer,
                answer_tokens=[tokenizer.decode([i]) for i in example.answer_ids],
                b=[_finite(p) for p in scored.log_b[g * K, :width].exp().tolist()],
                traces=[_trace(tokenizer, *trace) for trace in traces],
            )
        )
    return samples


def _trace(
    tokenizer: Tokenizer, padded: list[int], finish: int, reward: float, advantage: float, c: list[float]
) -> TraceSample:
    ids = [i for i in padded if i >= 0]
    return TraceSample(
        text=tokenizer.decode(ids),
        ids=ids,
        finish=FINISH[finish],
        reward=_finite(reward),
        advantage=_finite(advantage),
        c=[_finite(p) for p in c],
    )


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None  # NaN compares false


class SamplesWriter:
    """Appends to samples.jsonl; `resume_step` as for MetricsWriter."""

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        self._log = StepLog(run_dir / SAMPLES_FILE, resume_step)

    def write(self, samples: list[PromptSample]) -> None:
        """One line each. Raises ConfigError when the disk refuses it."""
        for sample in samples:
            self._log.append(asdict(sample))

    def close(self) -> None:
        """Closes the file."""
        self._log.close()

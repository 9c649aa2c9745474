"""Held-out questions: does the model answer right after its own trace, and how likely is the reference answer?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nrt_megatron.data import Example, Tokenizer
from nrt_megatron.data.traces import Generated, Generator, Request
from nrt_megatron.objective.metrics import Metrics
from nrt_megatron.recipe import Evaluation

EVALUATION_STEP = 2**31
"""Stands for the step in the randomness of evaluation traces, so that every evaluation draws the same numbers."""

METRICS = (
    "accuracy",
    "accuracy_greedy",
    "accuracy_direct",
    "answer_prob",
    "answer_prob_no_trace",
    "trace_length",
    "first_marker_prob",
    "first_eos_prob",
)
"""All that `Evaluator.run` gives, whatever it is asked: ranks reduce their metrics together."""


def matches(generated: str, reference: str, match: str) -> bool:
    """Whether an answer counts: `exact`, `last_word`, or `after:TEXT`; surrounding space never matters."""
    if match.startswith("after:"):
        mark = match.removeprefix("after:")
        generated, reference = generated.partition(mark)[2], reference.partition(mark)[2]
    elif match == "last_word":
        generated, reference = (text.split()[-1:] for text in (generated, reference))
        return generated == reference
    return generated.strip() == reference.strip()


@dataclass(frozen=True)
class Evaluator:
    """Evaluates this data-parallel rank's share of the questions.

    `traces` samples traces that end at the marker; `answers` continues until the end of sequence.
    """

    traces: Generator
    answers: Generator
    tokenizer: Tokenizer
    cfg: Evaluation
    max_new_tokens: int

    def run(self, questions: Sequence[Example]) -> Metrics:
        """(sum, count) of each `eval/` metric; of no questions, 0 and 0.

        accuracy: greedy answer after one sampled trace; accuracy_greedy: after the most likely trace;
        accuracy_direct: after the empty trace. answer_prob and answer_prob_no_trace: P(y*)^(1/T), the
        geometric mean of the token probabilities, after the sampled and the empty trace. trace_length:
        tokens of the sampled traces. first_marker_prob and first_eos_prob: probability that the trace ends at
        once, by the marker's first token or by the end of sequence; equal where an added marker was copied from EOS.
        """
        values: dict[str, list[torch.Tensor]] = {name: [torch.zeros(0)] for name in METRICS}
        for start in range(0, len(questions), self.cfg.batch_size):
            for key, value in self._batch(questions[start : start + self.cfg.batch_size]).items():
                values[key].append(value.double())
        return {
            f"eval/{key}": (torch.cat(v).double().sum(), torch.tensor(len(torch.cat(v)))) for key, v in values.items()
        }

    def _batch(self, questions: Sequence[Example]) -> dict[str, torch.Tensor]:
        sampled = self.traces.generate(self._request(questions, answers=[q.answer_ids for q in questions]))
        greedy = self.traces.generate(self._request(questions, greedy=True))
        lengths = torch.tensor([len(q.answer_ids) for q in questions])
        mask = torch.arange(sampled.answer_log_probs.size(-1)) < lengths[:, None]

        def mean_prob(log_probs: torch.Tensor) -> torch.Tensor:
            return (torch.where(mask, log_probs.cpu(), 0.0).sum(-1) / lengths).exp()

        return {
            "accuracy": self._right(questions, sampled),
            "accuracy_greedy": self._right(questions, greedy),
            "accuracy_direct": self._right(questions, None),
            "answer_prob": mean_prob(sampled.answer_log_probs[:, 0]),
            "answer_prob_no_trace": mean_prob(sampled.baseline_log_probs),
            "trace_length": sampled.trace_lengths[:, 0].cpu(),
            "first_marker_prob": self._first_prob(self.traces, questions),
            "first_eos_prob": self._first_prob(self.answers, questions),
        }

    def _first_prob(self, generator: Generator, questions: Sequence[Example]) -> torch.Tensor:
        """Probability of the token that ends `generator`'s sequences, straight after the prompt; [questions]."""
        ended = generator.generate(replace(self._request(questions, greedy=True), max_new_tokens=0))
        return ended.marker_log_probs[:, 0, 0].exp().cpu()

    def _request(self, questions: Sequence[Example], **options) -> Request:
        return Request(
            prompts=[q.prompt_ids for q in questions],
            indices=[q.index for q in questions],
            num_generations=1,
            max_new_tokens=self.max_new_tokens,
            step=EVALUATION_STEP,
            **options,
        )

    def _right(self, questions: Sequence[Example], traces: Generated | None) -> torch.Tensor:
        """1.0 where the greedy answer after `traces` (None: empty ones) matches; [questions]."""
        marker = self.tokenizer.marker_ids
        texts = [[]] * len(questions) if traces is None else [_ids(row) for row in traces.trace_ids[:, 0].tolist()]
        request = Request(
            prompts=[(*q.prompt_ids, *trace, *marker) for q, trace in zip(questions, texts)],
            indices=[q.index for q in questions],
            num_generations=1,
            max_new_tokens=self.cfg.max_answer_tokens,
            greedy=True,
        )
        answers = self.answers.generate(request).trace_ids[:, 0].tolist()
        right = [
            matches(self.tokenizer.decode(_ids(answer), skip_special_tokens=True), q.answer, self.cfg.match)
            for q, answer in zip(questions, answers)
        ]
        return torch.tensor(right, dtype=torch.float64)


def _ids(padded: list[int]) -> list[int]:
    return [i for i in padded if i >= 0]

"""How many tokens a sequence has room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from nrt_megatron.data.example import BadRow
from nrt_megatron.data.tokenizer import Tokenizer
from nrt_megatron.recipe import ConfigError, Recipe


@dataclass(frozen=True)
class Limits:
    """What has room, all in tokens: prompt + trace + marker + answer <= total.

    Attributes:
        total: `policy.max_total_sequence_length`.
        trace: `policy.generation.max_new_tokens`; 0 where no trace is sampled (`sft`).
        marker: length of the end-of-trace marker.
        prompt: `data.max_prompt_tokens`, or None.
        answer: `data.max_answer_tokens`, EOS included, or None.

    Raises:
        ConfigError: trace and marker leave no room for a prompt of one token and an answer of two.
    """

    total: int
    trace: int
    marker: int
    prompt: Optional[int] = None
    answer: Optional[int] = None

    def __post_init__(self) -> None:
        if self.room < 3:
            raise ConfigError.at(
                "policy.max_total_sequence_length",
                self.total,
                f"{self.room} tokens are left for prompt and answer beside {self._beside}",
                "raise it, or lower policy.generation.max_new_tokens",
            )

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: Tokenizer) -> Limits:
        return cls(
            total=recipe.policy.max_total_sequence_length,
            trace=0 if recipe.nrt.reward_scheme == "sft" else recipe.policy.generation.max_new_tokens,
            marker=len(tokenizer.marker_ids),
            prompt=recipe.data.max_prompt_tokens,
            answer=recipe.data.max_answer_tokens,
        )

    @property
    def room(self) -> int:
        """Tokens for prompt and answer together."""
        return self.total - self.trace - self.marker

    @property
    def longest_prompt(self) -> int:
        """Tokens a prompt may have; what is left is an answer of one token and EOS."""
        return min(self.room - 2, self.room if self.prompt is None else self.prompt)

    def check(self, prompt: int, answer: int) -> None:
        """Raise BadRow where a prompt and an answer of these lengths have no room."""
        limit = self.longest_prompt
        if prompt > limit:
            raise BadRow("prompt_too_long", f"the prompt has {prompt} tokens, the limit is {limit}", prompt)
        limit = min(self.room - prompt, self.room if self.answer is None else self.answer)
        if answer > limit:
            raise BadRow(
                "answer_too_long", f"the answer has {answer} tokens with EOS, the limit is {limit}", answer
            )

    def explain(self, reason: str) -> tuple[str, str]:
        """Where the limit behind `prompt_too_long` or `answer_too_long` comes from, and what to set instead."""
        own, key = {
            "prompt_too_long": (self.prompt, "data.max_prompt_tokens"),
            "answer_too_long": (self.answer, "data.max_answer_tokens"),
        }[reason]
        if own is not None and own < self.room - 2:
            return f"{key} = {own}", f"raise {key}"
        return (
            f"policy.max_total_sequence_length = {self.total} less {self._beside}",
            "raise policy.max_total_sequence_length or lower policy.generation.max_new_tokens",
        )

    @property
    def _beside(self) -> str:
        return f"a trace of {self.trace} and a marker of {self.marker}"

"""How many tokens a sequence has room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from nrt_megatron.data.example import BadRow
from nrt_megatron.data.tokenizer import Tokenizer
from nrt_megatron.recipe import ConfigError, Recipe

_TOTAL = "policy.max_total_sequence_length"


@dataclass(frozen=True)
class Limits:
    """What has room, all in tokens: prompt + trace + marker + answer <= total.

    Attributes:
        total: `policy.max_total_sequence_length`.
        trace: `policy.generation.max_new_tokens`; 0 where no trace is sampled (`sft`).
        marker: length of the end-of-trace marker.
        prompt: `data.max_prompt_tokens`, or None for what the total leaves.
        answer: `data.max_answer_tokens`, EOS included, or None likewise.

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
                _TOTAL,
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

    def check(self, prompt: int, answer: int) -> None:
        """Raise BadRow where a prompt and an answer of these lengths have no room.

        A prompt is too long where no answer, not even one token and EOS, would fit behind it.
        """
        if self.prompt is not None and prompt > self.prompt:
            raise _too_long("prompt", prompt, self.prompt, "data.max_prompt_tokens")
        if prompt > self.room - 2:
            raise _too_long("prompt", prompt, self.room - 2, _TOTAL, f"{self.total} less an answer and {self._beside}")
        if self.answer is not None and answer > self.answer:
            raise _too_long("answer", answer, self.answer, "data.max_answer_tokens")
        if answer > self.room - prompt:
            beside = f"{self.total} less a prompt of {prompt} and {self._beside}"
            raise _too_long("answer", answer, self.room - prompt, _TOTAL, beside)

    @property
    def _beside(self) -> str:
        return f"a trace of {self.trace} and a marker of {self.marker}"


def _too_long(what: str, tokens: int, limit: int, key: str, left: str = "") -> BadRow:
    """`left`: how much of the key's value is left, in words; the limit is the value itself otherwise."""
    why = f"the {what} has {tokens} tokens, the limit is {limit} ({key} = {left or limit})"
    remedy = f"raise {key} or lower policy.generation.max_new_tokens" if left else f"raise {key}"
    return BadRow(f"{what}_too_long", why, tokens, remedy)

"""How many prompts are decoded at a time, and on caches of which shape."""

from __future__ import annotations

from dataclasses import dataclass

ROOM = 1.5
"""A cache has at most this many times the columns that a prompt on it needs, unless all prompts on it fit at once."""


@dataclass(frozen=True)
class Share:
    """Prompts that are decoded on caches of one shape."""

    prompts: list[int]
    """Their places in the request, those that need most columns first."""
    at_once: int
    """Prompts that one cache holds, each with its K traces."""
    columns: int


def cache_shapes(
    prompt_lengths: list[int],
    answer_lengths: list[int],
    *,
    more_columns: int,
    num_generations: int,
    max_rows: int,
    max_tokens: int | None,
) -> list[Share]:
    """Deals prompts to caches of at most `max_rows` rows and `max_tokens` rows times columns, at least one prompt each.

    Rows of a cache share their columns: the longest prompt, the longest answer and `more_columns` for trace and marker.
    So long prompts are kept apart from short ones, of which more fit at once. Without `max_tokens` all are one share.
    """

    def needed(prompt: int) -> int:
        return prompt_lengths[prompt] + answer_lengths[prompt] + more_columns

    def at_once(columns: int) -> int:
        rows = max_rows if max_tokens is None else min(max_rows, max_tokens // columns)
        return max(1, rows // num_generations)

    shares: list[Share] = []
    longest_prompt = longest_answer = 0  # of the last share
    for prompt in sorted(range(len(prompt_lengths)), key=needed, reverse=True):
        longest_prompt = max(longest_prompt, prompt_lengths[prompt])
        longest_answer = max(longest_answer, answer_lengths[prompt])
        columns = longest_prompt + longest_answer + more_columns
        others = shares[-1].prompts if shares else []
        all_fit = len(others) < at_once(columns)
        if others and (max_tokens is None or all_fit or columns <= ROOM * needed(prompt)):
            others.append(prompt)
            shares[-1] = Share(others, at_once(columns), columns)
        else:
            longest_prompt, longest_answer = prompt_lengths[prompt], answer_lengths[prompt]
            shares.append(Share([prompt], at_once(needed(prompt)), needed(prompt)))
    return shares

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

    def shape(prompts: list[int]) -> tuple[int, int]:
        columns = max(prompt_lengths[p] for p in prompts) + max(answer_lengths[p] for p in prompts) + more_columns
        rows = max_rows if max_tokens is None else min(max_rows, max_tokens // columns)
        return max(1, rows // num_generations), columns

    def needed(prompt: int) -> int:
        return prompt_lengths[prompt] + answer_lengths[prompt] + more_columns

    shares: list[list[int]] = []
    for prompt in sorted(range(len(prompt_lengths)), key=needed, reverse=True):
        joined = [*shares[-1], prompt] if shares else [prompt]
        at_once, columns = shape(joined)
        if shares and (max_tokens is None or len(joined) <= at_once or columns <= ROOM * needed(prompt)):
            shares[-1] = joined
        else:
            shares.append([prompt])
    return [Share(prompts, *shape(prompts)) for prompts in shares]

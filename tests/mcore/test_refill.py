"""Prompts that wait take the place of traces that end, and batches that take turns on pipeline stages overlap."""

from __future__ import annotations

import random
from collections import Counter
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from nrt_megatron.data.traces import Generated, Request
from nrt_megatron.mcore import generate as generation
from nrt_megatron.mcore.cache_shapes import cache_shapes
from nrt_megatron.mcore.generate import MegatronGenerator
from nrt_megatron.mcore.kv_cache import KVCache
from nrt_megatron.recipe import Generation
from tests.distributed import run_ranks
from tests.mcore import tiny

K, LIMIT, STOP = 2, 24, tuple(range(2, 14))
PROMPTS = [tuple(20 + (7 * g + i) % 40 for i in range(1 + (5 * g) % 11)) for g in range(14)]
ANSWERS = [tuple(15 + (3 * g + i) % 45 for i in range(1 + (3 * g) % 7)) for g in range(14)]
TABLES = ("trace_log_probs", "trace_entropies", "stop_log_probs", "marker_log_probs", "answer_log_probs",
          "baseline_log_probs")  # fmt: skip
EQUAL = ("trace_ids", "trace_lengths", "finish", "stop_ids", "sampled_tokens", "scored_tokens")


@pytest.fixture(scope="module", params=["llama", "mistral"])
def checkpoint(request, tmp_path_factory):
    config = {"llama": tiny.LLAMA, "mistral": tiny.MISTRAL}[request.param]
    return tiny.save_hf(config, tmp_path_factory.mktemp(request.param))


def counted(directory, layout, options) -> tuple[Generated, Counter]:
    """What is drawn, and how often rows were refilled, columns dropped, and forwards of one column run."""
    seen = Counter()
    prefill, drop, forward = KVCache.prefill, KVCache.drop_unused_columns, KVCache.forward

    def prefilled(self, prompts, lengths, first_row):
        seen["refills"] += first_row > 0
        return prefill(self, prompts, lengths, first_row)

    def dropped(self, rows):
        seen["drops"] += 1
        drop(self, rows)

    def forwarded(self, tokens, *args, **kwargs):
        seen["decodes"] += tokens.size(1) == 1 and kwargs.get("targets") is None
        seen["cells"] = max(seen["cells"], self.positions.numel())
        return forward(self, tokens, *args, **kwargs)

    KVCache.prefill, KVCache.drop_unused_columns, KVCache.forward = prefilled, dropped, forwarded
    built = tiny.policy(directory, tiny.recipe(**layout))
    cfg = Generation(max_new_tokens=LIMIT, **options)
    generator = MegatronGenerator(
        built.runtime, built.chunks, cfg, marker_ids=(61, 62), stop_ids=STOP, vocab_size=tiny.VOCAB, seed=3
    )
    request = Request(PROMPTS, list(range(len(PROMPTS))), K, LIMIT, step=1, answers=ANSWERS)
    return generator.generate(request), seen


@pytest.fixture(scope="module")
def together(checkpoint) -> tuple[Generated, Counter]:
    """All traces in one batch."""
    ((drawn, seen),) = run_ranks(1, counted, checkpoint, {}, {})
    assert not seen["refills"] and len(drawn.trace_lengths.unique()) > 8, "traces of many lengths"
    return drawn, seen


def assert_same(got: Generated, expected: Generated) -> None:
    for name in EQUAL:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for name in TABLES:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("max_batch_size", [2, 6, 10, 25])
def test_refilled_rows_draw_what_they_draw_alone(checkpoint, together, max_batch_size):
    ((got, seen),) = run_ranks(1, counted, checkpoint, {}, {"max_batch_size": max_batch_size})
    assert_same(got, together[0])
    assert (seen["refills"] > 0) == (max_batch_size > K), "one prompt at a time leaves nothing to refill beside"
    if max_batch_size == 6:
        assert seen["drops"] > 0, "the cache had no more columns than a prompt needs"
        longest = together[0].trace_lengths.max(dim=1).values + 2
        alone = sum(int(longest[first : first + 3].max()) for first in range(0, len(PROMPTS), 3))
        assert seen["decodes"] < 0.8 * alone, "fewer forwards than batches that wait for their longest trace"


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ],
    ids=lambda layout: "-".join(map(str, layout.values())),
)
def test_every_layout_refills_alike(checkpoint, together, layout):
    for got, seen in run_ranks(2, counted, checkpoint, layout, {"max_batch_size": 6, "max_cache_tokens": 300}):
        assert_same(got, together[0])
        assert seen["refills"] > 0


def test_cache_tokens_bound_every_cache(checkpoint, together):
    ((got, seen),) = run_ranks(1, counted, checkpoint, {}, {"max_cache_tokens": 200})
    assert_same(got, together[0])
    assert 0 < seen["cells"] <= 200


def test_short_prompts_share_a_cache_and_long_ones_do_not_make_it_wide():
    """480 tokens, two rows a prompt: of 120 columns two prompts fit at once, of 30 columns eight."""
    prompts, answers = [10, 100, 10, 9, 100], [10, 10, 10, 9, 10]
    shares = cache_shapes(prompts, answers, more_columns=10, num_generations=2, max_rows=64, max_tokens=480)
    assert [(s.prompts, s.at_once, s.columns) for s in shares] == [([1, 4], 2, 120), ([0, 2, 3], 8, 30)]
    (one,) = cache_shapes(prompts, answers, more_columns=10, num_generations=2, max_rows=5, max_tokens=None)
    assert (one.prompts, one.at_once, one.columns) == ([1, 4, 0, 2, 3], 2, 120)


def test_prompts_that_fit_at_once_are_one_share_whatever_their_length():
    (share,) = cache_shapes([100, 5], [10, 5], more_columns=10, num_generations=2, max_rows=64, max_tokens=480)
    assert (share.prompts, share.at_once, share.columns) == ([0, 1], 2, 120)


def overlapped(directory) -> bool:
    """On two stages: the last one draws for its first batch only when the first has begun the second batch."""
    store = dist.distributed_c10d._get_default_store
    built = tiny.policy(directory, tiny.recipe(pipeline_model_parallel_size=2))
    forward, draw, begun = KVCache.forward, generation.draw, Counter()

    def forwarded(self, *args, **kwargs):
        begun[id(self)] += 1
        if len(begun) == 2 and built.runtime.pp_rank == 0:
            store().set("second batch", "begun")
        return forward(self, *args, **kwargs)

    def drawn(*args, **kwargs):
        store().wait(["second batch"], timedelta(seconds=30))
        return draw(*args, **kwargs)

    KVCache.forward, generation.draw = forwarded, drawn
    cfg = Generation(max_new_tokens=4, max_batch_size=2)
    generator = MegatronGenerator(
        built.runtime, built.chunks, cfg, marker_ids=(61,), stop_ids=(2,), vocab_size=tiny.VOCAB, seed=3
    )
    generator.generate(Request(PROMPTS[:2], [0, 1], 2, 4, step=1))
    return True


def test_a_stage_works_on_the_next_batch_while_the_last_one_draws(checkpoint):
    assert run_ranks(2, overlapped, checkpoint) == [True, True]


def longer_prompts_later(directory, options) -> Generated:
    """Short prompts with long answers come first, for they need more columns; then long prompts with short answers."""
    built = tiny.policy(directory, tiny.recipe())
    cfg = Generation(max_new_tokens=LIMIT, **options)
    generator = MegatronGenerator(
        built.runtime, built.chunks, cfg, marker_ids=(61,), stop_ids=tuple(range(2, 34)), vocab_size=tiny.VOCAB, seed=3
    )
    prompts = [(40 + g,) for g in range(4)] + [tuple(40 + (g + i) % 20 for i in range(16)) for g in range(6)]
    answers = [tuple(15 + (g + i) % 45 for i in range(24)) for g in range(4)] + [(15 + g,) for g in range(6)]
    return generator.generate(Request(prompts, list(range(10)), K, LIMIT, step=1, answers=answers))


def test_a_longer_prompt_that_comes_later_shows_no_row_what_was_scored_there(checkpoint):
    """Its columns reach beyond those in use: of the running rows they hold the answer scored after the empty trace."""
    (expected,) = run_ranks(1, longer_prompts_later, checkpoint, {})
    (got,) = run_ranks(1, longer_prompts_later, checkpoint, {"max_batch_size": 8})
    assert_same(got, expected)


def random_requests(directory) -> list[tuple[dict, Generated, Generated]]:
    """Requests of any shape, drawn in one batch and in small ones: (options of the small ones, small, one)."""
    built, found = tiny.policy(directory, tiny.recipe()), []
    for seed in range(8):
        pick = random.Random(seed)
        G, K, L = pick.randint(3, 12), pick.choice([1, 2, 3]), pick.choice([0, 1, 5, 16, 24])
        some = {"stop_ids": tuple(range(2, 2 + pick.choice([1, 8, 20]))), "marker_ids": pick.choice([(61,), (61, 62)])}

        def texts(lengths, pick=pick, G=G):
            return [tuple(pick.randint(15, 59) for _ in range(pick.choice(lengths))) for _ in range(G)]

        prompts, answers = texts([1, 2, 5, 12, 20]), texts([1, 2, 8, 20]) if pick.random() < 0.8 else None
        request = Request(prompts, list(range(G)), K, L, step=1, answers=answers, baseline=pick.random() < 0.8)

        def draw(some=some, seed=seed, request=request, **options) -> Generated:
            cfg = Generation(max_new_tokens=24, **options)
            how = {**some, "vocab_size": tiny.VOCAB, "seed": seed}
            return MegatronGenerator(built.runtime, built.chunks, cfg, **how).generate(request)

        small = [
            {"max_batch_size": pick.randint(K, 4 * K)},
            {"max_cache_tokens": pick.randint(60 * K, 200 * K)},
            {"max_batch_size": 2 * K, "max_tokens_per_forward": pick.randint(3, 40)},
        ]
        found += [(options, draw(**options), draw()) for options in small]
    return found


def test_requests_of_any_shape(checkpoint):
    (found,) = run_ranks(1, random_requests, checkpoint)
    for _, got, expected in found:
        assert_same(got, expected)

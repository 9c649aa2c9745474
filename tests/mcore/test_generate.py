"""Rollout and in-place scoring against transformers, and against themselves at every layout."""

from __future__ import annotations

import pytest
import torch

from nrt_megatron.data.traces import EOS, LENGTH, MARKER, Generated, Request
from nrt_megatron.mcore.generate import MegatronGenerator
from nrt_megatron.recipe import Generation
from tests.distributed import run_ranks
from tests.mcore import tiny

PROMPTS = [(1, 5, 6, 9), (11, 12), (3, 4, 5, 6, 7, 8)]
ANSWERS = [(20, 21, 2), (30, 2), (40, 41, 42, 43, 2)]
STOP, LIMIT, K, SEED = (2, 3), 12, 8, 5
LAYOUTS = [
    dict(tensor_model_parallel_size=2),
    dict(tensor_model_parallel_size=4),
    dict(pipeline_model_parallel_size=2),
    dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    dict(tensor_model_parallel_size=2, sequence_parallel=True),
    dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
]


@pytest.fixture(scope="module", params=["llama", "mistral"])
def checkpoint(request, tmp_path_factory):
    config = {"llama": tiny.LLAMA, "mistral": tiny.MISTRAL}[request.param]
    return tiny.save_hf(config, tmp_path_factory.mktemp(request.param))


def generate(directory, marker=(7,), groups=(0, 1, 2), layout=None, **options) -> Generated:
    built = tiny.policy(directory, tiny.recipe(**(layout or {})))
    cfg = Generation(max_new_tokens=LIMIT, **{"max_batch_size": 64, **options})
    generator = MegatronGenerator(
        built.runtime, built.chunks, cfg, marker_ids=marker, stop_ids=STOP, vocab_size=tiny.VOCAB, seed=SEED
    )
    request = Request(PROMPTS, [0, 1, 2], K, LIMIT, step=4, answers=ANSWERS)
    return generator.generate(request.subset(list(groups)))


def hf_log_probs(model, ids: list[int], scale: float = 1.0) -> torch.Tensor:
    logits = model(torch.tensor([ids])).logits[0].double() / scale
    return torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("num_marker_tokens", [1, 2])
def test_every_log_prob_is_that_of_a_full_transformers_forward(checkpoint, num_marker_tokens):
    from transformers import AutoModelForCausalLM

    # A marker that the random model does write: tokens it drew in a run with another marker.
    (other,) = run_ranks(1, generate, checkpoint)
    marker = tuple(next(t for t in other.trace_ids[0].tolist() if t[4] >= 0)[3 : 3 + num_marker_tokens])
    (got,) = run_ranks(1, generate, checkpoint, marker)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).double()
    seen = set()
    with torch.no_grad():
        for g, (x, y) in enumerate(zip(PROMPTS, ANSWERS)):
            for k in range(K):
                z = [i for i in got.trace_ids[g, k].tolist() if i >= 0]
                assert len(z) == got.trace_lengths[g, k] <= LIMIT
                expected = hf_log_probs(model, [*x, *z, *marker, *y])
                start, m, a = len(x) - 1, len(marker), len(y)
                pieces = expected[start : start + len(z) + m + a].split([len(z), m, a])
                torch.testing.assert_close(got.trace_log_probs[g, k, : len(z)].double(), pieces[0], atol=1e-4, rtol=0)
                torch.testing.assert_close(got.marker_log_probs[g, k].double(), pieces[1], atol=1e-4, rtol=0)
                torch.testing.assert_close(got.answer_log_probs[g, k, :a].double(), pieces[2], atol=1e-4, rtol=0)
                finish = int(got.finish[g, k])
                seen.add(finish)
                if finish == EOS:
                    ended = hf_log_probs(model, [*x, *z, int(got.stop_ids[g, k])])[-1]
                    assert abs(float(got.stop_log_probs[g, k]) - float(ended)) < 1e-4
                    assert int(got.stop_ids[g, k]) in STOP
                assert (finish == LENGTH) <= (len(z) == LIMIT)
                assert not set(z) & set(STOP), "an end token ends the trace and is no part of it"
            baseline = hf_log_probs(model, [*x, *marker, *y])[-len(y) :]
            torch.testing.assert_close(got.baseline_log_probs[g, : len(y)].double(), baseline, atol=1e-4, rtol=0)
    assert seen == {MARKER, EOS, LENGTH}, f"only {seen} occurred"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(f"{v}" for v in layout.values()))
def test_every_layout_draws_the_same_traces(checkpoint, layout):
    (alone,) = run_ranks(1, generate, checkpoint)
    world = layout.get("tensor_model_parallel_size", 1) * layout.get("pipeline_model_parallel_size", 1)
    for got in run_ranks(world, generate, checkpoint, (7,), (0, 1, 2), layout):
        assert torch.equal(got.trace_ids, alone.trace_ids)
        assert torch.equal(got.finish, alone.finish)
        for name in (
            "trace_log_probs",
            "trace_entropies",
            "marker_log_probs",
            "answer_log_probs",
            "baseline_log_probs",
        ):
            torch.testing.assert_close(getattr(got, name), getattr(alone, name), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options", [{"groups": (1,)}, {"groups": (2, 0)}, {"max_batch_size": 8}, {"max_tokens_per_forward": 7}]
)
def test_traces_do_not_depend_on_the_batch_they_are_drawn_in(checkpoint, options):
    (alone,) = run_ranks(1, generate, checkpoint)
    groups = options.get("groups", (0, 1, 2))
    (got,) = run_ranks(1, _generate_with, checkpoint, options)
    assert torch.equal(got.trace_ids, alone.trace_ids[list(groups)])
    width = got.answer_log_probs.size(-1)
    expected = alone.answer_log_probs[list(groups)][..., :width]
    for g, group in enumerate(groups):
        n = len(ANSWERS[group])
        torch.testing.assert_close(got.answer_log_probs[g, :, :n], expected[g, :, :n], atol=1e-4, rtol=0)


def _generate_with(directory, options) -> Generated:
    return generate(directory, **options)


def test_top_k_of_one_is_greedy_and_greedy_needs_no_randomness(checkpoint):
    (got,) = run_ranks(1, _generate_with, checkpoint, {"top_k": 1})
    assert torch.equal(got.trace_ids, got.trace_ids[:, :1].expand_as(got.trace_ids))
    (nucleus,) = run_ranks(1, _generate_with, checkpoint, {"top_p": 1e-6})
    assert torch.equal(nucleus.trace_ids, got.trace_ids)

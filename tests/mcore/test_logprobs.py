"""Chunked vocabulary-parallel log-probs and entropies against dense float64 ones, with gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nrt_megatron.mcore import runtime
from nrt_megatron.mcore.logprobs import token_log_probs
from tests.distributed import run_ranks
from tests.mcore import tiny

N, H = 13, 8


def inputs(vocab: int, padded: int, dtype: torch.dtype):
    torch.manual_seed(0)
    # Drawn in float32 for every dtype, so that all compare the same numbers.
    hidden, weight, scale, grads = torch.randn(N, H), torch.randn(padded, H), torch.rand(N) + 0.5, torch.randn(2, N)
    targets = torch.randint(0, vocab, (N,))
    return hidden.to(dtype), weight.to(dtype), targets, scale.to(dtype), grads.to(dtype)


def dense(vocab: int, padded: int):
    hidden, weight, targets, scale, grads = inputs(vocab, padded, torch.float64)
    hidden.requires_grad_(), weight.requires_grad_()
    log_p = torch.log_softmax(hidden @ weight[:vocab].t() * scale[:, None], -1)
    out = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (out[0] @ grads[0] + out[1] @ grads[1]).backward()
    return out[0].detach(), out[1].detach(), hidden.grad, weight.grad


def sharded(vocab: int, padded: int, chunk: int, dtype: torch.dtype):
    world = dist_world()
    place = runtime.initialize(tiny.recipe(tensor_model_parallel_size=world))
    hidden, weight, targets, scale, grads = inputs(vocab, padded, dtype)
    rows = weight.chunk(world)[place.rank].clone().requires_grad_()
    hidden.requires_grad_()
    log_probs, entropies = token_log_probs(
        hidden, rows, targets, scale, vocab_size=vocab, group=dist.group.WORLD, chunk_size=chunk
    )
    (log_probs @ grads[0].to(log_probs) + entropies @ grads[1].to(entropies)).backward()
    return log_probs.detach(), entropies.detach(), hidden.grad, rows.grad


def dist_world() -> int:
    import os

    return int(os.environ["WORLD_SIZE"])


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("vocab,padded", [(32, 32), (29, 32), (7, 32)], ids=["full", "padded", "empty shards"])
@pytest.mark.parametrize("chunk", [1000, 5])
def test_equals_dense_float64(tp, vocab, padded, chunk):
    expected = dense(vocab, padded)
    got = run_ranks(tp, sharded, vocab, padded, chunk, torch.float64)
    for rank, (log_probs, entropies, grad_hidden, grad_rows) in enumerate(got):
        shard = slice(rank * padded // tp, (rank + 1) * padded // tp)
        torch.testing.assert_close(log_probs, expected[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(entropies, expected[1], atol=1e-12, rtol=0)
        torch.testing.assert_close(grad_hidden, expected[2], atol=1e-12, rtol=0)
        torch.testing.assert_close(grad_rows, expected[3][shard], atol=1e-12, rtol=0)


def test_at_a_real_vocabulary():
    vocab = 128_256
    expected = dense(vocab, vocab)
    for log_probs, entropies, grad_hidden, _ in run_ranks(2, sharded, vocab, vocab, 4, torch.float64):
        torch.testing.assert_close(log_probs, expected[0], atol=1e-10, rtol=0)
        torch.testing.assert_close(entropies, expected[1], atol=1e-10, rtol=0)
        torch.testing.assert_close(grad_hidden, expected[2], atol=1e-10, rtol=0)
    for log_probs, entropies, grad_hidden, _ in run_ranks(2, sharded, vocab, vocab, 4, torch.float32):
        torch.testing.assert_close(log_probs.double(), expected[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(entropies.double(), expected[1], atol=1e-6, rtol=1e-6)
        # A sum over 128,256 rows in float32; the dense computation in float32 is as far off.
        torch.testing.assert_close(grad_hidden.double(), expected[2], atol=2e-3, rtol=0)


def _gradcheck() -> bool:
    runtime.initialize(tiny.recipe())
    hidden, weight, targets, scale, _ = inputs(7, 8, torch.float64)

    def fn(h, w):
        return token_log_probs(h, w, targets, scale, vocab_size=7, group=dist.group.WORLD, chunk_size=3)

    return torch.autograd.gradcheck(fn, (hidden.requires_grad_(), weight.requires_grad_()))


def test_gradcheck():
    assert run_ranks(1, _gradcheck) == [True]


def _nothing():
    runtime.initialize(tiny.recipe())
    hidden, weight = torch.randn(0, H, requires_grad=True), torch.randn(8, H, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    out = token_log_probs(hidden, weight, none, torch.ones(0), vocab_size=8, group=dist.group.WORLD)
    (out[0].sum() + out[1].sum()).backward()
    return [tuple(o.shape) for o in out], weight.grad.abs().max().item()


def test_a_micro_batch_without_scored_tokens_has_zero_gradients():
    assert run_ranks(1, _nothing) == [([(0,), (0,)], 0.0)]

"""A sequence shared by ranks: who has which chunk, attention as on one rank, and what is kept for the way back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank

from nrt_megatron.data.batch import micro_batch
from nrt_megatron.mcore import context, runtime
from nrt_megatron.mcore.attention import SDPACoreAttention, additive, hidden_columns, whole_sequences
from tests.distributed import run_ranks
from tests.mcore import tiny

S, B, HEADS, KV_HEADS, D = 16, 2, 4, 2, 8


def start(ranks: int):
    runtime.initialize(tiny.recipe(context_parallel_size=ranks))
    return parallel_state.get_context_parallel_group()


def attention(window: int | None) -> SDPACoreAttention:
    config = SimpleNamespace(attention_dropout=0.0, window_size=(window - 1, 0) if window else None)
    module = SDPACoreAttention.__new__(SDPACoreAttention)
    torch.nn.Module.__init__(module)
    module.shared_by = parallel_state.get_context_parallel_group()
    module.softmax_scale, module.window, module.config = None, window, config
    return module


def own(tensor: torch.Tensor, group) -> torch.Tensor:
    """This rank's chunks of [s, b, ...]."""
    return get_batch_on_this_cp_rank({"x": tensor.transpose(0, 1)}, cp_group=group)["x"].transpose(0, 1)


def branches() -> torch.Tensor:
    """A prompt of 4, traces of 5 and 4, padding."""
    return torch.tensor([[0] * 4 + [1] * 5 + [2] * 4 + [-1] * 3] * B)


def attend(ranks: int, window: int | None, packed: bool):
    """(largest error of the output, of each gradient) against dense attention on one rank."""
    group = start(ranks)
    generator = torch.Generator().manual_seed(1)
    shapes = [(S, B, HEADS, D), (S, B, KV_HEADS, D), (S, B, KV_HEADS, D)]
    wholes = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.randn(S, B, HEADS * D, generator=generator, dtype=torch.float64)
    positions, tree = torch.arange(S).expand(B, S), branches() if packed else None
    hidden = hidden_columns(positions, positions, None if tree is None else tree >= 0, window, tree, tree)
    q, k, v = (x.permute(1, 2, 0, 3) for x in wholes)
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) / D**0.5).masked_fill(hidden, -torch.inf)
    expected = (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)
    (expected * weight).sum().backward()
    parts = [own(x.detach(), group).clone().requires_grad_() for x in wholes]
    mask = None
    if packed:
        mine = get_batch_on_this_cp_rank({"p": positions, "b": tree}, cp_group=group)
        mask = additive(hidden_columns(mine["p"], positions, tree >= 0, window, tree, mine["b"]), torch.float64)
    out = attention(window)(*parts, mask)
    (out * own(weight, group)).sum().backward()
    pairs = [(out, expected), *((part.grad, x.grad) for part, x in zip(parts, wholes))]
    return [float((got - own(x, group)).detach().abs().max()) for got, x in pairs]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 3, 6])
@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_is_that_of_one_rank(ranks, window, packed):
    for errors in run_ranks(ranks, attend, ranks, window, packed):
        assert max(errors) < 1e-12


def kept_bytes() -> tuple[int, int]:
    """Bytes that the backward pass of attention holds; and of one rank's queries, keys, values and output."""
    group = start(4)
    shapes = [(S, B, HEADS, D), (S, B, HEADS, D), (S, B, HEADS, D)]
    q, k, v = (own(torch.randn(shape), group).clone().requires_grad_() for shape in shapes)
    held: dict[int, int] = {}
    joined = torch.empty(0)

    class Watch(context._Kept):
        def pack(self, whole):
            nonlocal joined
            joined, inner = whole, super().pack(whole)

            def pack(saved):
                packed = inner(saved)
                if isinstance(packed, torch.Tensor):
                    held[packed.untyped_storage().data_ptr()] = packed.untyped_storage().nbytes()
                return packed

            return pack

    context._Kept = Watch
    out = attention(None)(q, k, v, None)
    assert joined.untyped_storage().nbytes() == 4 * 2 * k.numel() * k.element_size()
    assert joined.untyped_storage().data_ptr() not in held
    own_bytes = 4 * q.numel() * q.element_size()
    out.sum().backward()
    return sum(held.values()), own_bytes


def test_whole_keys_and_values_are_not_kept_for_the_backward_pass():
    for held, own_bytes in run_ranks(4, kept_bytes):
        assert held < own_bytes


def unequal_graphs() -> float:
    """One rank's attention saves nothing at all, another's twice: the exchanges still meet."""
    group = start(2)
    part = torch.randn(4, 3, requires_grad=True)

    def attend(joined: torch.Tensor) -> torch.Tensor:
        return joined.sum() if group.rank() == 0 else (joined * joined).sum() + joined.exp().sum()

    context.with_whole(part, group, attend).backward()
    return float(part.grad.abs().sum())


def test_what_kernels_save_may_differ_between_ranks():
    assert all(total > 0 for total in run_ranks(2, unequal_graphs, timeout=30))


def shares(ranks: int, packed: bool):
    group = start(ranks)
    batch = micro_batch(
        tiny.grid(8), torch.arange(8), temperature=1.0, pad_multiple=2 * ranks, traces_per_tree=4 if packed else 0
    )
    share = context.share_of(batch)
    b = len(batch.tokens)
    column, row = share.sources // b, share.sources % b
    scored = torch.arange(len(batch.targets)) if share.scored is None else share.scored
    # The token and position at each source are those of the whole batch.
    whole_column, whole_row = batch.sources[scored] // b, batch.sources[scored] % b
    assert torch.equal(share.tokens[row, column], batch.tokens[whole_row, whole_column])
    assert torch.equal(share.position_ids[row, column], batch.position_ids[whole_row, whole_column])
    scores = torch.stack([scored.float(), -scored.float()]).requires_grad_()
    put_together = context.of_all_ranks(scores, share, len(batch.targets))
    (put_together * torch.arange(len(batch.targets))).sum().backward()
    assert torch.equal(scores.grad[0], scored.float())
    lengths = [None] * group.size()
    dist.all_gather_object(lengths, len(scored), group=group)
    return put_together.detach(), sum(lengths), len(batch.targets)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_token_is_scored_by_one_rank_and_known_to_all(ranks, packed):
    for together, counted, n in run_ranks(ranks, shares, ranks, packed):
        assert counted == n
        assert torch.equal(together, torch.stack([torch.arange(n), -torch.arange(n)]).float())


def toggled() -> list[bool]:
    module = attention(None) if start(2).size() == 2 else None
    seen = [module.shared_by is None]
    with whole_sequences(module):
        seen.append(module.shared_by is None)
    return [*seen, module.shared_by is None]


def test_sequences_are_whole_in_a_rollout():
    assert run_ranks(2, toggled) == [[False, True, False]] * 2

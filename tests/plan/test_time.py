"""Seconds by hand, and how they answer to a change of the layout."""

from dataclasses import replace

import pytest

from nrt_megatron.plan import efficiency, load_hardware, plan
from nrt_megatron.plan.costs import Costs, Pass, Seconds
from nrt_megatron.plan.rollout import Lengths, RolloutBatch, rollout_work
from nrt_megatron.plan.traffic import update_traffic
from nrt_megatron.plan.training import update_time
from nrt_megatron.recipe import Recipe, SequencePacking

from .test_memory import costs, recipe

SEQUENCE = Pass(1, 8192)


def test_a_layer_by_hand():
    """Llama-70B, TP 8, one sequence of 8,192 tokens, bf16, sequence parallel."""
    at = costs(recipe(sequence_parallel=True))
    time = at.layer(SEQUENCE)
    assert time.matmul == pytest.approx(2 * 855_638_016 / 8 * 8192 / (989.4e12 * 0.68))
    assert time.attention == pytest.approx(4 * 8192**2 / 2 * 8192 / 8 / (989.4e12 * 0.35))
    # Four exchanges of 7/8 of the bf16 hidden states over NVLink.
    assert time.tensor_exchange == pytest.approx(4 * 8192 * 8192 * 2 * 7 / 8 / (450e9 * 0.8))
    accesses = 10 * 8192 / 8 + 2 * (64 + 8) * 128 / 8 + 3 * 28672 / 8
    assert time.memory == pytest.approx(2 * accesses * 8192 / (3.35e12 * 0.85))
    assert time.host == 0
    back = at.layer(SEQUENCE, backward=True)
    assert back.matmul == pytest.approx(2 * time.matmul) and back.attention == pytest.approx(2.5 * time.attention)
    fp8 = at.layer(SEQUENCE, fp8=True)
    assert fp8.matmul == pytest.approx(time.matmul / 2, rel=1e-3)
    casts = efficiency.FP8_CAST_BYTES * (3 * 8192 + 28672) / 8
    assert fp8.memory - time.memory == pytest.approx(casts * 8192 / (3.35e12 * 0.85))


def test_few_tokens_wait_for_the_host():
    at = costs(recipe())
    one = at.layer(Pass(1, 1, cached=100), inference=True)
    assert one.total == pytest.approx(efficiency.HOST_SECONDS_PER_LAYER)
    assert at.layer(SEQUENCE, inference=True).host == 0


def test_decoding_reads_weights_and_cache():
    """855,638,016 / 8 weights; 64 rows of 8,192 columns of one key-value head: 512 bytes a column and layer."""
    time = costs(recipe()).layer(Pass(64, 1, cached=8192), inference=True)
    assert time.matmul == pytest.approx(855_638_016 / 8 * 2 / (3.35e12 * 0.85))
    assert time.attention == pytest.approx(64 * 8192 * 512 / (3.35e12 * 0.85))


def test_attended_pairs():
    at = costs(recipe())
    assert at.attended(Pass(1, 100)) == 5000
    assert at.attended(Pass(1, 1, cached=100)) == 100.5
    # A prompt of 10 with 4 branches of 5: the prompt once, and each branch as a sequence of 15 less the prompt.
    assert at.attended(Pass(1, 30, branches=4, trunk=10)) == 50 + 4 * (112.5 - 50)
    windowed = replace(at, shape=replace(at.shape, sliding_window=10))
    assert windowed.attended(Pass(1, 100)) == 50 + 90 * 10


def test_model_flops_of_llama_70b():
    """6 x parameters without the embedding, and causal attention: 449 GFLOP a token at 8,192."""
    at = costs(recipe())
    per_token = 3 * at.model_flops(SEQUENCE) / 8192
    assert per_token == pytest.approx(6 * (80 * 855_638_016 + 128256 * 8192) + 6 * 80 * 8192 * 8192, rel=1e-6)
    assert at.model_flops(Pass(1, 8192, scored=0)) < at.model_flops(SEQUENCE)


def test_the_pipeline_waits_for_its_slowest_stage():
    """m times the last stage, which has the output layer, and one pass of the three others (over the chunks)."""
    at = costs(recipe(sequence_parallel=True))
    one, many = (update_time(at, SEQUENCE, m, chunked_loss=False) for m in (1, 64))
    assert many.work.total == pytest.approx(64 * one.work.total)
    assert many.bubble == pytest.approx(one.bubble)
    layers = 20 * (at.layer(SEQUENCE).total + at.layer(SEQUENCE, backward=True).total)
    head = at.output_layer(8192, chunked=False).total + at.output_layer(8192, chunked=False, backward=True).total
    assert one.work.total == pytest.approx(layers + head)
    transfer = 2 * 8192 * 8192 / 8 * 2 / (50e9 * 0.8)
    assert one.pipeline_exchange == pytest.approx(transfer)
    assert one.bubble == pytest.approx(3 * (layers + transfer))
    chunked = update_time(
        costs(recipe(sequence_parallel=True, virtual_pipeline_model_parallel_size=5)),
        SEQUENCE,
        64,
        chunked_loss=False,
    )
    assert chunked.bubble == pytest.approx(3 * layers / 5) and chunked.pipeline_exchange == 0


def test_recomputation_adds_a_forward_pass():
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    plain, again = (
        update_time(costs(recipe(**more)), SEQUENCE, 8, chunked_loss=False).work.total for more in ({}, full)
    )
    assert again - plain == pytest.approx(8 * 20 * costs(recipe()).layer(SEQUENCE).total)


def test_gradients_over_the_network_and_behind_the_backward_pass():
    """TP 8 leaves one card a rank: 4 bytes a parameter to 3 of 4 ranks, and as much back, or 2 bytes back."""
    parameters = 2_271_551_488
    times = {
        name: update_time(costs(recipe(**flags)), SEQUENCE, 8, chunked_loss=False).gradient_exchange
        for name, flags in {
            "plain": {},
            "shared": {"use_distributed_optimizer": True},
            "hidden": {
                "use_distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            },
        }.items()
    }
    assert times["plain"] == pytest.approx(8 * parameters * 0.75 / (50e9 * 0.8))
    assert times["shared"] == pytest.approx(6 * parameters * 0.75 / (50e9 * 0.8))
    assert times["hidden"] < 0.2 * times["shared"]


def test_rings_share_the_cards_of_a_node():
    """Data-parallel ranks: eight neighbours of a node drive eight cards, up to NVLink; one of eight drives its own."""
    wide, narrow = (costs(recipe(tp=tp, pp=1, gpus=64)).layout for tp in (1, 8))
    assert wide.data_bandwidth == pytest.approx(8 * 50e9 * 0.8)
    assert narrow.data_bandwidth == pytest.approx(50e9 * 0.8)
    assert costs(recipe(tp=1, pp=1, gpus=8)).layout.data_bandwidth == pytest.approx(450e9 * 0.8)


def test_traffic_by_hand():
    sent = update_traffic(costs(recipe(sequence_parallel=True, use_distributed_optimizer=True)), SEQUENCE, 10)
    states = 8192 * 8192 * 2
    assert sent["tensor"] == 10 * 20 * 8 * states * 7 / 8
    assert sent["pipeline"] == 10 * 2 * states / 8
    assert sent["context"] == 0 and sent["data"] == 6 * 2_271_551_488 * 0.75


def test_rollout_of_one_batch():
    """Prompts once, not once a trace; as many steps as the trace is long; scoring of traces and baselines."""
    at = costs(recipe())
    batch = RolloutBatch(prompts=4, traces=8, lengths=Lengths(100, 50, 20))
    work = rollout_work(at, batch, prompts_of_rank=12)
    dp = at.layout.dp
    prefill = at.model_flops(Pass(4, 100, scored=1))
    steps = 50 * at.model_flops(Pass(32, 1, cached=125))
    assert work.sampling_flops == pytest.approx(3 * dp * (prefill + steps))
    assert work.scoring_flops > 3 * dp * 2 * 80 * 855_638_016 * (32 + 4) * 21
    floor = 3 * 50 * 80 * efficiency.HOST_SECONDS_PER_LAYER
    assert floor < work.sampling_seconds < 1.2 * floor
    # Four batches on four stages: each step takes about as long as one batch's, since every stage has work.
    turns = rollout_work(at, replace(batch, in_flight=4), prompts_of_rank=16)
    alone = rollout_work(at, batch, prompts_of_rank=16)
    assert alone.sampling_seconds / 4 < turns.sampling_seconds < 1.2 * alone.sampling_seconds / 4
    assert turns.sampling_flops == alone.sampling_flops
    assert rollout_work(at, batch, prompts_of_rank=13).sampling_seconds == alone.sampling_seconds


def test_the_trainers_own_log_probs_cost_a_forward_pass():
    settings = recipe()
    settings = replace(
        settings, policy=replace(settings.policy, tokenizer=replace(settings.policy.tokenizer, path="t"))
    )
    weighed = replace(settings, nrt=replace(settings.nrt, rollout_importance_sampling=True))
    plain, more = (plan(each, load_hardware("h100"), build=False) for each in (settings, weighed))
    assert more.update == plain.update
    extra = more.scoring.flops - plain.scoring.flops
    assert extra == pytest.approx(plain.update.flops / 3)
    assert more.scoring.seconds - plain.scoring.seconds < plain.update.seconds / 2


def test_lengths_are_cut_to_the_limits():
    settings = recipe()
    assert Lengths.typical(settings, 300, None, 415) == Lengths(300, 2048, 415)
    long = Lengths.typical(settings, 6000, 4000, 6000)
    assert long.total == pytest.approx(8192) and long.trace == 2048 and long.prompt == long.answer
    sft = replace(settings, nrt=replace(settings.nrt, reward_scheme="sft"))
    assert Lengths.typical(sft, 300, None, 415).trace == 0


def test_fine_tuning_has_no_rollout():
    settings = recipe()
    tokenizer = replace(settings.policy.tokenizer, path="t")
    policy = replace(settings.policy, tokenizer=tokenizer, train_global_batch_size=64)
    sft = replace(settings, policy=policy, nrt=replace(settings.nrt, reward_scheme="sft"))
    planned = plan(sft, load_hardware("h100"), build=False)
    assert planned.rollout.seconds == planned.scoring.seconds == 0
    assert planned.num_updates == 4 and planned.stages[0].kv_cache_gib == 0
    assert planned.update.tokens == 256 * (300 + 1 + 415)


@pytest.mark.parametrize("prompt,trace,pays", [(4000, 100, True), (300, 2048, False)])
def test_packed_prompts_are_trained_on_once(prompt, trace, pays):
    """Of long prompts that saves work; in a tree of long traces attention computes pairs that no token sees."""
    settings = recipe(use_distributed_optimizer=True)
    policy = replace(settings.policy, tokenizer=replace(settings.policy.tokenizer, path="t"), train_micro_batch_size=8)
    rows, trees = (
        plan(
            replace(settings, policy=replace(policy, sequence_packing=SequencePacking(enabled=enabled))),
            load_hardware("h200"),
            prompt_tokens=prompt,
            trace_tokens=trace,
            build=False,
        )
        for enabled in (False, True)
    )
    assert rows.update.tokens - trees.update.tokens == 256 * 7 * prompt
    assert (trees.update.seconds < rows.update.seconds) is pays


def test_a_masked_attention_computes_all_pairs():
    """A tree of 30 columns; a window of 10 in 100 columns, and on one of two ranks with chunks of 25."""
    at = costs(recipe())
    tree = Pass(1, 30, branches=4, trunk=10)
    assert at.mask_columns(tree) == 30 and at.mask_columns(Pass(1, 30)) == 0
    seconds = 4 * 30 * 30 * 8192 / 8 / (989.4e12 * 0.35)
    assert at.layer(tree).attention == pytest.approx(seconds)
    windowed = replace(at, shape=replace(at.shape, sliding_window=10))
    assert windowed.mask_columns(Pass(1, 10)) == 0 and windowed.mask_columns(Pass(1, 100)) == 100
    shared = replace(windowed, layout=costs(recipe(context_parallel_size=2)).layout)
    assert shared.mask_columns(Pass(1, 100)) == 25 + 10


def test_seconds_add_and_scale():
    both = Seconds(matmul=1, host=2) + Seconds(matmul=3) * 2
    assert both == Seconds(matmul=7, host=2) and both.total == 9
    assert isinstance(costs(recipe()), Costs)


def test_context_parallel_ranks_gather_keys_and_values():
    """Llama-70B, TP 8: one key-value head of 128 a rank in bf16, 512 bytes a token; three of four shares come from
    others. Backward they are gathered again and their gradients scattered; once more where attention is recomputed."""
    whole, shared = (
        costs(recipe(sequence_parallel=True)),
        costs(recipe(sequence_parallel=True, context_parallel_size=4)),
    )
    gathered = 512 * 8192 * 3 / 4
    forward, backward = (shared.layer(SEQUENCE, backward=back) for back in (False, True))
    assert forward.context_exchange == pytest.approx(gathered / shared.layout.context_bandwidth)
    assert backward.context_exchange == pytest.approx(2 * forward.context_exchange)
    assert forward.matmul == pytest.approx(whole.layer(SEQUENCE).matmul / 4)
    assert forward.attention == pytest.approx(whole.layer(SEQUENCE).attention / 4)
    assert update_traffic(shared, SEQUENCE, 10)["context"] == pytest.approx(10 * 20 * 3 * gathered)
    again = costs(recipe(sequence_parallel=True, context_parallel_size=4, recompute_granularity="selective"))
    assert update_traffic(again, SEQUENCE, 10)["context"] == pytest.approx(10 * 20 * 4 * gathered)


def test_context_parallel_ranks_draw_as_replicas_do():
    """Sequences are whole in a rollout: DP 1 x CP 4 draws in the time of DP 4, from caches of the same size."""

    def planned(cp: int):
        settings = recipe(context_parallel_size=cp, use_distributed_optimizer=True)
        tokenizer = replace(settings.policy.tokenizer, path="t")
        return plan(
            replace(settings, policy=replace(settings.policy, tokenizer=tokenizer)), load_hardware("h200"), build=False
        )

    plain, shared = planned(1), planned(4)
    assert shared.layout["data"] == 1 and shared.layout["context"] == 4
    assert shared.rollout == plain.rollout and shared.scoring == plain.scoring
    for one, other in zip(plain.stages, shared.stages):
        assert other.kv_cache_gib == one.kv_cache_gib and other.optimizer_gib == one.optimizer_gib
        assert other.activations_gib == pytest.approx(one.activations_gib / 4)


def test_padding_takes_time_and_memory_and_counts_as_no_work():
    """Blocks of 128 tokens on each of 8 tensor ranks: up to 1,023 columns of padding, half of that on average."""
    plain, shared = ({"fp8": "e4m3", "fp8_recipe": "blockwise", "sequence_parallel": on} for on in (False, True))
    rows = [replace(r, policy=replace(r.policy, max_total_sequence_length=8000)) for r in map(_recipe, (plain, shared))]
    few, many = (plan(row, load_hardware("h100"), build=False) for row in rows)
    assert many.update.tokens == few.update.tokens and many.update.flops == few.update.flops
    products = [planned.update_seconds["matmul"] for planned in (few, many)]
    assert 1.1 < products[1] / products[0] < (300 + 2048 + 1 + 415 + 1023 / 2) / (300 + 2048 + 1 + 415 + 15 / 2)
    few, many = (plan(row, load_hardware("h100"), True, build=False) for row in rows)
    assert few.tokens_per_sequence == many.tokens_per_sequence == {"total": 8000.0}
    # Log-probs are those of the sequence's own tokens.
    assert 1.02 < many.update_seconds["matmul"] / few.update_seconds["matmul"] < 8192 / 8000


def _recipe(fields: dict) -> Recipe:
    settings = recipe(**fields)
    return replace(settings, policy=replace(settings.policy, tokenizer=replace(settings.policy.tokenizer, path="t")))

"""A rollout at another layout: the weights are training's bit for bit, and the traces those of one rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.data.traces import Request
from nrt_megatron.mcore.generate import MegatronGenerator
from nrt_megatron.mcore.hf import global_parameters
from nrt_megatron.mcore.rollout_model import MovedWeights, OrderedCopies, rollout_model
from nrt_megatron.mcore.runtime import parallel_state
from nrt_megatron.recipe import Generation
from nrt_megatron.update import update
from tests.distributed import run_ranks
from tests.mcore import tiny
from tests.mcore.test_layouts import hf_tensors, local, settings

TP, PP, VPP, CP, SP, DISTOPT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "use_distributed_optimizer",
)
OVERLAP = {DISTOPT: True, "overlap_grad_reduce": True, "overlap_param_gather": True}
CASES = {
    "pp2 dp2 -> dp4": ("llama", {PP: 2}, {PP: 1}),
    "tp2 pp2 -> tp2": ("llama", {TP: 2, PP: 2, SP: True}, {PP: 1}),
    "tp2 pp2 -> tp1": ("mistral", {TP: 2, PP: 2}, {TP: 1, PP: 1}),
    "tp2 pp2 -> tp4": ("mistral", {TP: 2, PP: 2}, {TP: 4, PP: 1}),
    "pp2 in chunks, dp2 -> tp2": ("llama", {PP: 2, VPP: 2, **OVERLAP}, {TP: 2, PP: 1}),
    "cp2 pp2 -> tp2": ("llama", {PP: 2, CP: 2}, {TP: 2, PP: 1}),
    "dp4 -> pp2, with a copy of a tied embedding": ("llama", {}, {PP: 2}),
    "pp2 dp2 -> dp4, fp8 rehearsed": ("llama in fp8", {PP: 2}, {PP: 1}),
}
PRECISION = {"llama in fp8": dict(fp8="e4m3", fp8_recipe="blockwise", fp8_emulation=True)}
"""Scales by blocks of a token: those of a whole tensor depend on what else is in the batch, and so on who draws it."""
PROMPTS = [(1, 5, 6, 9), (11, 12), (3, 4, 5, 6, 7, 8), (9, 9, 2)]
ANSWERS = [(20, 21, 2), (30, 2), (40, 41, 42, 43, 2), (5, 6)]
STOP, LIMIT, K, SEED = (2, 3), 8, 4, 5


def recipe(training: dict, rollout: dict):
    made = settings(1, dict(training))
    generation = Generation(max_new_tokens=LIMIT, max_batch_size=8, **rollout)
    return replace(made, policy=replace(made.policy, generation=generation))


def traces(model, cfg, share: list[int], greedy: bool):
    how = dict(marker_ids=(7,), stop_ids=STOP, vocab_size=tiny.VOCAB, seed=SEED)
    drawing = model.for_replica(MegatronGenerator(model.place, model.chunks, cfg, **how))
    generator = model.for_training(drawing)
    request = Request(PROMPTS, list(range(len(PROMPTS))), K, LIMIT, step=4, answers=ANSWERS, greedy=greedy)
    return generator.generate(request.subset(share))


def parameters(chunks, place):
    values = {n: p.detach().clone() for c in chunks for n, p in global_parameters(c)}
    return (place.tp_rank, place.tp_size, place.dp_rank), None, values


def one_case(directory, training: dict, rollout: dict) -> dict:
    made = recipe(training, rollout)
    policy = tiny.policy(directory, made)
    model = rollout_model(policy)
    model.refresh()
    share = torch.arange(len(PROMPTS)).chunk(policy.runtime.dp_size)[policy.runtime.dp_rank].tolist()
    first = {greedy: traces(model, made.policy.generation, share, greedy) for greedy in (False, True)}
    moved = parameters(model.chunks, model.place)
    update(policy, local(tiny.grid(8, 3), policy), made)
    model.refresh()
    after = parameters(policy.chunks, policy.runtime), parameters(model.chunks, model.place)
    return {"share": share, "traces": first, "moved": moved, "after": after, "kind": type(model)}


def all_cases(directories):
    done = {}
    for name, (kind, training, rollout) in CASES.items():
        done[name] = one_case(directories[kind], {**training, **PRECISION.get(kind, {})}, rollout)
        parallel_state.destroy_model_parallel()
    return done


def alone(directories):
    done = {}
    for kind, directory in directories.items():
        done[kind] = one_case(directory, PRECISION.get(kind, {}), {})
        parallel_state.destroy_model_parallel()
    return done


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    configs = {"llama": tiny.LLAMA, "mistral": tiny.MISTRAL, "llama in fp8": tiny.LLAMA}
    return {kind: tiny.save_hf(config, tmp_path_factory.mktemp(kind)) for kind, config in configs.items()}


@pytest.fixture(scope="module")
def single(directories):
    return run_ranks(1, alone, directories)[0]


@pytest.fixture(scope="module")
def results(directories):
    return run_ranks(4, all_cases, directories)


@pytest.mark.parametrize("name", CASES)
def test_the_moved_weights_are_the_trained_ones_bit_for_bit(directories, results, name):
    from safetensors.torch import load_file

    kind = CASES[name][0]
    shape = ModelShape.from_dir(directories[kind])
    stored = load_file(directories[kind] / "model.safetensors")
    case = [rank[name] for rank in results]
    moved = hf_tensors(shape, [rank["moved"] for rank in case])
    trained, again = (hf_tensors(shape, [rank["after"][i] for rank in case]) for i in (0, 1))
    assert moved.keys() == trained.keys() == again.keys() and len(moved) >= 38
    for key, value in moved.items():
        assert torch.equal(value, stored[key]), key
        assert torch.equal(again[key], trained[key]), key
        assert not torch.equal(again[key], value), f"{key} did not change with the update"
    assert all(rank["kind"] is MovedWeights for rank in case)


@pytest.mark.parametrize("name", CASES)
def test_traces_are_those_of_one_rank(single, results, name):
    expected = single[CASES[name][0]]["traces"]
    for rank in results:
        case = rank[name]
        for greedy, known in expected.items():
            got, wanted = case["traces"][greedy], known.groups(torch.tensor(case["share"]))
            for field in ("trace_ids", "trace_lengths", "finish", "stop_ids", "sampled_tokens", "scored_tokens"):
                assert torch.equal(getattr(got, field), getattr(wanted, field)), field
            for field in ("trace_log_probs", "trace_entropies", "marker_log_probs", "stop_log_probs",
                          "answer_log_probs", "baseline_log_probs"):  # fmt: skip
                torch.testing.assert_close(getattr(got, field), getattr(wanted, field), atol=1e-4, rtol=0)


def in_bf16(directory) -> bool:
    """Weights in bf16, over the service for GPUs: its messages are torch.distributed's, which gloo carries as well."""
    policy = tiny.policy(directory, recipe({TP: 2, "bf16": True}, {TP: 1}))
    model = rollout_model(policy)
    model._copies = OrderedCopies()
    model.refresh()
    return all(parameter.dtype == torch.bfloat16 for chunk in model.chunks for parameter in chunk.parameters())


def test_bf16_weights_move_by_the_service_for_gpus(directories):
    assert run_ranks(4, in_bf16, directories["mistral"]) == [True] * 4


def damaged(directory) -> list[str]:
    """What `verify` says when one rank's copy is not what it should be, and when it is again."""
    policy = tiny.policy(directory, recipe({PP: 2}, {PP: 1}))
    model = rollout_model(policy)
    model.refresh()
    value = dict(global_parameters(model.chunks[0]))["decoder.layers.2.mlp.linear_fc1.weight"]
    sound = value.data.clone()
    flipped = sound.clone()
    flipped.view(torch.int32)[5, 7] ^= 1
    swapped = sound[torch.tensor([1, 0, *range(2, len(sound))])]
    interleaved = torch.cat([sound.chunk(4)[i] for i in (0, 2, 1, 3)])  # gate and up, as of two tensor ranks
    said = []
    for harm in (flipped, swapped, interleaved, sound):
        value.data = harm if policy.runtime.rank == 1 else sound
        try:
            model.verify()
            said.append("")
        except AssertionError as error:
            said.append(str(error))
    return said


def test_weights_that_were_moved_wrongly_are_named(directories):
    sound, harmed = run_ranks(2, damaged, directories["llama"])
    assert sound == [""] * 4 and harmed[-1] == ""
    assert all("decoder.layers.2.mlp.linear_fc1.weight (of 1) differs" in said for said in harmed[:3])

"""What only a GPU can show, on one of them: `make gpu-check`. None of it has been run where this was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from nrt_megatron.checkpoints import CheckpointMeta
from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.importer import import_hf
from nrt_megatron.data import Example
from nrt_megatron.data.batch import SequenceGrid, micro_batch, micro_batches
from nrt_megatron.mcore import HAS_GPU, runtime
from nrt_megatron.mcore.attention import SDPACoreAttention, additive, hidden_columns
from nrt_megatron.mcore.checkpoint import Saver, load, load_weights
from nrt_megatron.mcore.generate import MegatronGenerator
from nrt_megatron.mcore.model import build_chunks, use_transformer_engine
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.objective.loss import nrt_loss
from nrt_megatron.recipe import NRT, Checkpointing, Megatron, Recipe
from nrt_megatron.rollout import rollout
from nrt_megatron.scoring import score, sequence_grid
from nrt_megatron.update import update
from tests.mcore import te_case, tiny
from tests.mcore.test_on_policy import MARKER, PROMPTS, STOP, K

pytestmark = pytest.mark.gpu

LOCAL, TE = {"transformer_impl": "local"}, {"transformer_impl": "transformer_engine"}
HYBRID = {"bf16": True, "fp8": "hybrid", "fp8_recipe": "tensorwise"}
WEIGHT = "decoder.layers.0.mlp.linear_fc1.weight"
BLOCKS = {"bf16": True, "fp8": "e4m3", "fp8_recipe": "blockwise"}


@pytest.fixture(autouse=True)
def on_gpu() -> Iterator[None]:
    """A test ends with its process groups, also when it fails."""
    if not HAS_GPU:
        pytest.skip("no GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    runtime.shutdown()


def needs(fields: dict) -> None:
    """Skips with the reason where the GPU has not the number format. Fails without Transformer Engine: all but these
    tests run elsewhere."""
    if fields.get("transformer_impl") != "transformer_engine":
        return
    if find_spec("transformer_engine") is None:
        pytest.fail("Transformer Engine is not installed: pip install '.[gpu]'", pytrace=False)
    import transformer_engine.pytorch  # noqa: F401  an installation that does not load fails, too

    capability, cuda = torch.cuda.get_device_capability(), torch.version.cuda
    if "fp8" in fields and capability < (8, 9):
        pytest.skip(f"FP8 needs compute capability 8.9, this is {capability}")
    if fields.get("fp8_recipe") == "blockwise" and (capability < (9, 0) or tuple(map(int, cuda.split("."))) < (12, 9)):
        pytest.skip(f"block scales need Hopper and CUDA 12.9, this is {capability} and {cuda}")


@pytest.fixture(scope="module", params=["llama", "mistral"])
def checkpoint(request, tmp_path_factory):
    config = {"llama": tiny.LLAMA, "mistral": tiny.MISTRAL}[request.param]
    return tiny.save_hf(config, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save_hf(tiny.LLAMA, tmp_path_factory.mktemp("llama"))


def transformers_log_probs(directory, grid: SequenceGrid) -> list[torch.Tensor]:
    """float32 [tokens that are scored] of each sequence, computed on the CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).float().eval()
    out = []
    with torch.no_grad():
        for i in range(len(grid)):
            ids = grid.tokens[i, : grid.lengths[i]]
            log_p = torch.log_softmax(model(ids[None]).logits[0], -1)
            kinds = grid.kind[i, : len(ids)].nonzero()[:, 0]
            out.append(log_p[kinds - 1, ids[kinds]])
    return out


@pytest.mark.parametrize(
    "fields, bound",
    [(LOCAL, 2e-4), (TE, 2e-4), ({**LOCAL, "bf16": True}, 0.1), ({**TE, "bf16": True}, 0.1), ({**TE, **HYBRID}, 0.5)],
    ids=["local fp32", "te fp32", "local bf16", "te bf16", "te fp8"],
)
def test_forward_equals_transformers(checkpoint, fields, bound):
    needs(fields)
    policy = tiny.policy(checkpoint, tiny.recipe(**fields))
    assert use_transformer_engine(policy.recipe.megatron_cfg) == (fields["transformer_impl"] != "local")
    grid = replace(tiny.grid(8), eos_ended=torch.zeros(8, dtype=torch.bool))
    rows = torch.arange(8)
    results = policy.log_probs(
        [micro_batch(grid, row, temperature=1.0, pad_multiple=policy.pad_multiple) for row in rows.split(1)]
    )
    for expected, got in zip(transformers_log_probs(checkpoint, grid), results, strict=True):
        assert (got.log_probs.cpu() - expected).abs().max() < bound


def settings(fields: dict, fp8: str = "same", weighted: bool = False) -> Recipe:
    recipe = tiny.recipe(mbs=2, **fields)
    policy = replace(recipe.policy, train_global_batch_size=K * len(PROMPTS))
    nrt = NRT(
        num_prompts_per_step=len(PROMPTS),
        num_generations_per_prompt=K,
        reward_scheme="geometric_mean",
        rollout_importance_sampling=weighted,
    )
    return replace(
        recipe, nrt=nrt, policy=replace(policy, generation=replace(policy.generation, max_new_tokens=10, fp8=fp8))
    )


def steps(policy: MegatronPolicy, recipe: Recipe, number: int) -> list[dict[str, float]]:
    """Rows of whole steps: rollout, scoring, update."""
    generator = MegatronGenerator(
        policy.runtime, policy.chunks, recipe.policy.generation, marker_ids=MARKER, stop_ids=STOP,
        vocab_size=tiny.VOCAB, seed=1,
    )  # fmt: skip
    examples = [Example(i, p, (20 + i, 21, 2), "", "") for i, p in enumerate(PROMPTS)]
    rows = []
    for step in range(number):
        scored = score(rollout(generator, examples, recipe, step + 1), recipe.nrt)
        metrics = update(policy, sequence_grid(scored, MARKER), recipe)
        metrics.add(scored.metrics, scored.maxima)
        rows.append(metrics.reduce(policy.runtime))
    return rows


STEPS = {
    "local fp32": (LOCAL, 2e-3),
    "te fp32": (TE, 2e-3),
    "te bf16 distopt": ({**TE, "bf16": True, "use_distributed_optimizer": True}, 0.1),
    "te fp8 tensorwise": ({**TE, **HYBRID}, 1.0),
    "te fp8 tensorwise, edges in bf16": ({**TE, **HYBRID, "first_last_layers_bf16": True}, 1.0),
    "te fp8 delayed": ({**TE, **HYBRID, "fp8_recipe": "delayed"}, 2.0),
    "te fp8 blockwise": ({**TE, **BLOCKS}, 0.5),
    "te fp8 weights": ({**TE, **HYBRID, "fp8_param": True, "use_distributed_optimizer": True}, 1.0),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_on_nccl_and_the_gap_of_their_rollouts(llama, name):
    """The second step's gap shows whether a rollout sees the weights that the update left, FP8 copies of them too."""
    fields, bound = STEPS[name]
    needs(fields)
    rows = steps(tiny.policy(llama, settings(fields)), settings(fields), 3)
    for row in rows:
        assert row["update/skipped_share"] == 0 and row["grad_norm"] > 0
        assert row["logprob_gap/max"] < bound and row["ratio/mean"] == pytest.approx(1, abs=0.1)
        assert row["logprob_gap/abs_mean"] < 3 * rows[0]["logprob_gap/abs_mean"] + 1e-5
        print({key: row[key] for key in ("loss", "grad_norm", "logprob_gap/abs_mean", "logprob_gap/max")})


def test_a_rollout_in_bf16_of_a_trainer_in_fp8_is_weighed(llama):
    fields = {**TE, **HYBRID}
    needs(fields)
    recipe = settings(fields, fp8="none", weighted=True)
    (row,) = steps(tiny.policy(llama, recipe), recipe, 1)
    assert row["ratio/mean"] == pytest.approx(1, abs=1e-3)
    assert 0.5 < row["rollout_weight/mean"] < 1.5 and row["logprob_gap/abs_mean"] > 1e-4


def log_probs(policy: MegatronPolicy) -> torch.Tensor:
    batches = micro_batches(tiny.grid(8), torch.arange(8), 2, temperature=1.0, pad_multiple=policy.pad_multiple)
    return torch.cat([result.log_probs for result in policy.log_probs(batches)])


@pytest.mark.parametrize("fields", [LOCAL, TE], ids=["local", "te"])
def test_a_converted_checkpoint_loads(checkpoint, tmp_path, fields):
    needs(fields)
    import_hf(checkpoint, tmp_path / "converted", tokenizer=False)
    policy = tiny.policy(checkpoint, tiny.recipe(**fields))
    expected = log_probs(policy)
    load_weights(tmp_path / "converted", policy)
    assert torch.equal(log_probs(policy), expected)


@pytest.mark.parametrize("name", ["local fp32", "te fp32", "te bf16 distopt", "te fp8 tensorwise", "te fp8 weights"])
def test_a_run_goes_on_from_its_checkpoint(llama, tmp_path, name):
    fields = STEPS[name][0]
    needs(fields)
    policy, recipe = tiny.policy(llama, settings(fields)), settings(fields)
    steps(policy, recipe, 1)
    meta = CheckpointMeta(1, 1, policy.shape.to_hf())
    saved = Saver(tmp_path, Checkpointing()).save(policy, meta, lambda path: None)
    (expected,), left_at = steps(policy, recipe, 1), log_probs(policy)
    runtime.shutdown()
    again = tiny.policy(llama, recipe)
    load(saved, again)
    (row,) = steps(again, recipe, 1)
    for key in ("loss", "grad_norm", "lr"):
        assert row[key] == pytest.approx(expected[key], rel=1e-5), key
    assert (log_probs(again) - left_at).abs().max() < 1e-4


@pytest.mark.parametrize("fields", [{"bf16": True}, HYBRID, BLOCKS], ids=["bf16", "fp8 tensorwise", "fp8 blockwise"])
def test_weight_gradients_of_micro_batches_are_added_in_float32(checkpoint, fields):
    """By the layers themselves, twice (what the first time left is gone), against sums of rounded ones."""
    needs({**TE, **fields})
    policy = tiny.policy(checkpoint, recipe := tiny.recipe(**TE, **fields))
    batches = micro_batches(tiny.grid(8), torch.arange(8), 2, temperature=1.0, pad_multiple=policy.pad_multiple)
    layers = [layer for layer in policy.chunks[0].modules() if hasattr(layer, "fuse_wgrad_accumulation")]
    assert layers and all(layer.fuse_wgrad_accumulation for layer in layers)

    def gradients() -> dict[str, torch.Tensor]:
        policy.gradients(batches, partial(nrt_loss, settings=recipe.nrt))
        return {name: p.main_grad.clone() for name, p in policy.chunks[0].named_parameters()}

    first, again = gradients(), gradients()
    for layer in layers:
        layer.fuse_wgrad_accumulation = False
    rounded = gradients()
    assert not torch.equal(first[WEIGHT], rounded[WEIGHT]), "then it would not matter"
    for name, value in first.items():
        assert value.norm() > 0
        for other in (again[name], rounded[name]):
            assert (value - other).norm() < 1e-2 * value.norm(), name


@pytest.mark.parametrize("fp8", [HYBRID, BLOCKS], ids=["tensorwise", "blockwise"])
def test_transformer_engines_fp8_is_what_was_rehearsed(fp8):
    """Equal operands; sums of another order, in Hopper's accumulators."""
    needs({**TE, **fp8})
    shape = ModelShape.from_hf(tiny.LLAMA)
    runtime.initialize(tiny.recipe())
    results = []
    for more in (TE, {"fp8_emulation": True}):
        (chunk,) = build_chunks(shape, Megatron(make_vocab_size_divisible_by=8, **{**fp8, **more}))
        results.append(te_case.measure(chunk, shape))
    native, rehearsed = results
    assert native["log_prob"] == pytest.approx(rehearsed["log_prob"], rel=1e-2)
    assert native["gradients"] == pytest.approx(rehearsed["gradients"], rel=0.1)


def test_the_adapter_for_cpus_is_not_even_imported():
    import sys

    assert "nrt_megatron.mcore.cpu" not in sys.modules


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize("groups", [8, 2])
def test_attention_of_a_later_chunk_is_that_of_the_mask(dtype, tolerance, groups):
    """What a context-parallel rank computes: fewer queries than keys, the last of them."""
    shapes = [(128, 2, 8, 64), (384, 2, groups, 64), (384, 2, groups, 64)]
    inputs = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    core = SDPACoreAttention.__new__(SDPACoreAttention)
    torch.nn.Module.__init__(core)
    core.shared_by, core.window, core.softmax_scale = None, None, None
    rows = torch.arange(384, device="cuda")[None]
    results = []
    for mask in (None, additive(hidden_columns(rows[:, 256:], rows), dtype)):
        out = core(*inputs, mask)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)

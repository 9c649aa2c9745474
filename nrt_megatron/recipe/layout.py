"""How a step is spread: ranks, data-parallel replicas, sequences, updates; and what must divide what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nrt_megatron.recipe.errors import ConfigError
from nrt_megatron.recipe.megatron import Megatron
from nrt_megatron.recipe.precision import check_precision_shape
from nrt_megatron.recipe.schema import Policy, Recipe

_TP = "policy.megatron_cfg.tensor_model_parallel_size"
_PP = "policy.megatron_cfg.pipeline_model_parallel_size"
_CP = "policy.megatron_cfg.context_parallel_size"
_VPP = "policy.megatron_cfg.virtual_pipeline_model_parallel_size"


def world_size(recipe: Recipe) -> int:
    """Ranks of the whole run: nodes times GPUs, or `cluster.cpu_ranks` where `cluster.gpus_per_node` is 0."""
    cluster = recipe.cluster
    return cluster.num_nodes * cluster.gpus_per_node if cluster.gpus_per_node else cluster.cpu_ranks


def model_parallel_size(recipe: Recipe) -> int:
    """Ranks that hold one replica of the model: TP x PP x CP."""
    cfg = recipe.policy.megatron_cfg
    return cfg.tensor_model_parallel_size * cfg.pipeline_model_parallel_size * cfg.context_parallel_size


def uncut(cfg: Megatron) -> Megatron:
    """The same model on one rank."""
    return replace(
        cfg,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1,
        sequence_parallel=False,
        use_distributed_optimizer=False,
        overlap_param_gather=False,
        overlap_grad_reduce=False,
    )


def data_parallel_size(recipe: Recipe) -> int:
    """Replicas of the model. Meaningful for a recipe that `check` accepts."""
    return world_size(recipe) // model_parallel_size(recipe)


def num_traces_per_prompt(recipe: Recipe) -> int:
    """Sequences that one question becomes: K, or 1 for `sft`, which samples no trace."""
    return 1 if recipe.nrt.reward_scheme == "sft" else recipe.nrt.num_generations_per_prompt


def num_sequences_per_step(recipe: Recipe) -> int:
    """Sequences trained on in one step, over all ranks."""
    return recipe.nrt.num_prompts_per_step * num_traces_per_prompt(recipe)


def num_updates_per_step(recipe: Recipe) -> int:
    """Optimizer updates in one step: one per global batch."""
    return num_sequences_per_step(recipe) // recipe.policy.train_global_batch_size


def token_multiple(policy: Policy) -> int:
    """What the number of columns of a micro-batch is padded to a multiple of.

    Each context-parallel rank has two equal chunks of them, and under sequence parallelism each tensor rank an equal
    part of these. Transformer Engine's FP8 products sum over a rank's tokens in the weight gradient and want them
    aligned: 16, for mxfp8 32 (`megatron.core.fp8_utils.get_fp8_align_size`). `blockwise` wants whole blocks of 128 for
    each rank with sequence parallelism, since ranks scale their own tokens before these are gathered for the weight
    gradient, and where one packed row is a batch, as NeMo-RL pads.
    """
    cfg, aligned = policy.megatron_cfg, 1
    if cfg.fp8 is not None and not cfg.fp8_emulation:
        blocks = cfg.fp8_recipe == "blockwise" and (cfg.sequence_parallel or policy.sequence_packing.enabled)
        aligned = 128 if blocks else 32 if cfg.fp8_recipe == "mxfp8" else 16
    chunks = 2 if cfg.context_parallel_size > 1 else 1
    shared = cfg.context_parallel_size * (cfg.tensor_model_parallel_size if cfg.sequence_parallel else 1)
    return shared * math.lcm(chunks, aligned)


def check_ranks(recipe: Recipe) -> None:
    """Replicas must fill the ranks. Raises ConfigError."""
    cfg, world, replica = recipe.policy.megatron_cfg, world_size(recipe), model_parallel_size(recipe)
    if world % replica:
        tp, pp = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
        cp = f" x CP {cfg.context_parallel_size}" if cfg.context_parallel_size > 1 else ""
        problem = f"{world} ranks cannot be split into replicas of TP {tp} x PP {pp}{cp} = {replica}"
        near = sorted({max(world // replica, 1) * replica, (world // replica + 1) * replica})
        sizes = {_TP: tp, _PP: pp, _CP: cfg.context_parallel_size}
        cut = [key for key, size in sizes.items() if size > 1]
        fitting = nearest([n for n in divisors(world) if n < tp], tp) if cut == [_TP] else []
        lower = f", or lower {listed(cut)}" if cut != [_TP] else ""
        other = f", or {_TP} to {listed(fitting)}" if fitting else lower
        key, value = _world_key(recipe) if replica < world else (cut[0], sizes[cut[0]])
        ranks = "the product of cluster.num_nodes and cluster.gpus_per_node"
        ranks = ranks if recipe.cluster.gpus_per_node else "cluster.cpu_ranks"
        raise ConfigError.at(key, value, problem, f"set {ranks} to {listed(near)}{other}")


def check_sequence_cut(recipe: Recipe) -> None:
    """Whether a sequence of full length is cut into equal chunks, so that no padding makes it longer: two for each
    context-parallel rank, and of each a part for every tensor-parallel rank that has its own. Raises ConfigError."""
    cfg, length = recipe.policy.megatron_cfg, recipe.policy.max_total_sequence_length
    cp, tp = cfg.context_parallel_size, cfg.tensor_model_parallel_size if cfg.sequence_parallel else 1
    chunks = 2 * cp * tp
    if cp > 1 and length % chunks:
        near = [n for n in (length // chunks * chunks, (length // chunks + 1) * chunks) if n]
        problem = f"not a multiple of {chunks} = 2 x CP {cp}{f' x TP {tp} with sequence_parallel' if tp > 1 else ''}"
        remedy = f"set {listed(near)}, or another {_CP}"
        raise ConfigError.at("policy.max_total_sequence_length", length, problem, remedy)


def _world_key(recipe: Recipe) -> tuple[str, Any]:
    cluster = recipe.cluster
    if not cluster.gpus_per_node:
        return "cluster.cpu_ranks", cluster.cpu_ranks
    if cluster.num_nodes == 1:
        return "cluster.gpus_per_node", cluster.gpus_per_node
    return "cluster.num_nodes x cluster.gpus_per_node", world_size(recipe)


def check_batches(recipe: Recipe) -> None:
    """Whole groups of K stay on one rank, and every update and micro-batch is full. Raises ConfigError."""
    prompts, k = recipe.nrt.num_prompts_per_step, num_traces_per_prompt(recipe)
    batch, micro = recipe.policy.train_global_batch_size, recipe.policy.train_micro_batch_size
    dp, total = data_parallel_size(recipe), num_sequences_per_step(recipe)
    if prompts % dp:
        problem = f"cannot be dealt evenly to {dp} data-parallel ranks"
        near = [n for n in (prompts // dp * dp, (prompts // dp + 1) * dp) if n]
        raise ConfigError.at("nrt.num_prompts_per_step", prompts, problem, f"set a multiple of {dp}: {listed(near)}")
    if total % batch or batch % (k * dp):
        whole = f"{prompts} prompts x {k} traces = {total} sequences a step" if k > 1 else f"{total} prompts a step"
        problem = (
            f"{whole} do not fill whole updates of it"
            if total % batch
            else f"{dp} data-parallel ranks must each get whole groups of K = {k}"
        )
        valid = [k * dp * n for n in divisors(prompts // dp) if k * n % micro == 0]
        valid = valid or [k * dp * n for n in divisors(prompts // dp)]
        remedy = f"set {listed(nearest(valid, batch))}"
        raise ConfigError.at("policy.train_global_batch_size", batch, problem, remedy)
    check_training_batch(recipe)


def check_training_batch(recipe: Recipe) -> None:
    """Every data-parallel rank gets the same number of full micro-batches of an update. Raises ConfigError."""
    batch, micro = recipe.policy.train_global_batch_size, recipe.policy.train_micro_batch_size
    dp = data_parallel_size(recipe)
    if batch % dp:
        near = [n for n in (batch // dp * dp, (batch // dp + 1) * dp) if n]
        problem = f"cannot be dealt evenly to {dp} data-parallel ranks"
        raise ConfigError.at("policy.train_global_batch_size", batch, problem, f"set {listed(near)}")
    if batch // dp % micro:
        problem = f"does not divide the {batch // dp} sequences of an update on one of {dp} data-parallel ranks"
        valid = nearest(divisors(batch // dp), micro)
        raise ConfigError.at("policy.train_micro_batch_size", micro, problem, f"set {listed(valid)}")
    cfg = recipe.policy.megatron_cfg
    pp, vpp = cfg.pipeline_model_parallel_size, cfg.virtual_pipeline_model_parallel_size
    if vpp and batch // dp // micro % pp:  # Megatron's interleaved schedule takes them in groups of PP
        problem = f"makes {batch // dp // micro} micro-batches an update, not a multiple of the {pp} pipeline stages"
        valid = [n for n in divisors(batch // dp) if batch // dp // n % pp == 0]
        one_chunk = f"{_VPP} to null"
        remedy = f"set {listed(nearest(valid, micro))}, or {one_chunk}" if valid else f"set {one_chunk}"
        raise ConfigError.at("policy.train_micro_batch_size", micro, problem, remedy)
    traces = num_traces_per_prompt(recipe)
    if recipe.policy.sequence_packing.enabled and micro % traces:
        problem = f"cuts a packed prompt with its {traces} traces"
        valid = [n * traces for n in divisors(batch // dp // traces)]
        remedy = f"set {listed(nearest(valid, micro))}, or policy.sequence_packing.enabled=false"
        raise ConfigError.at("policy.train_micro_batch_size", micro, problem, remedy)


def check_training_shape(recipe: Recipe, config: Mapping[str, Any], source: str) -> None:
    """Whether a Hugging Face `config.json` can be cut as the recipe says. Raises ConfigError.

    Sizes that the config does not give, or gives in a form that is no positive integer, are left to the
    code that builds the model: it refuses them with their own message.
    """
    cfg = recipe.policy.megatron_cfg
    tp = cfg.tensor_model_parallel_size
    cut = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = {key: config[key] for key in cut if is_size(config.get(key))}
    for key, size in sizes.items():
        if size % tp:
            valid = [n for n in divisors(size) if all(other % n == 0 for other in sizes.values())]
            remedy = f"set {listed(nearest(valid, tp))}"
            raise ConfigError.at(_TP, tp, f"does not divide {key} = {size} of {source}", remedy)
    if is_size(config.get("num_hidden_layers")):
        _check_stages(recipe, config["num_hidden_layers"], source)
    check_precision_shape(recipe, config, source)
    positions, limit = config.get("max_position_embeddings"), recipe.policy.max_total_sequence_length
    if is_size(positions) and limit > positions:
        problem = f"beyond max_position_embeddings = {positions} of {source}"
        trace = "policy.generation.max_new_tokens"
        beside = f", and {trace} below that" if recipe.policy.generation.max_new_tokens >= positions else ""
        raise ConfigError.at("policy.max_total_sequence_length", limit, problem, f"set at most {positions}{beside}")


def _check_stages(recipe: Recipe, num_layers: int, source: str) -> None:
    """Stages and chunks of equal size, with embedding and output layer counted as layers where the recipe says so."""
    cfg = recipe.policy.megatron_cfg
    extra = cfg.account_for_embedding_in_pipeline_split + cfg.account_for_loss_in_pipeline_split
    layers, pp, vpp = num_layers + extra, cfg.pipeline_model_parallel_size, cfg.virtual_pipeline_model_parallel_size
    counted = f"num_hidden_layers = {num_layers}{f' + {extra}' if extra else ''} of {source}"
    if layers % pp:
        remedy = f"set {listed(nearest(divisors(layers), pp))}"
        raise ConfigError.at(_PP, pp, f"does not divide {counted}", remedy)
    if layers % (pp * (vpp or 1)):
        valid = [n for n in divisors(layers // pp) if n > 1]
        problem = f"{pp} stages x {vpp} chunks do not divide {counted}"
        raise ConfigError.at(_VPP, vpp, problem, f"set {listed([*nearest(valid, vpp or 2), 'null'])}")


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def divisors(number: int) -> list[int]:
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def nearest(values: list[int], to: int, count: int = 4) -> list[int]:
    return sorted(sorted(values, key=lambda value: abs(value - to))[:count])


def listed(values: list[Any]) -> str:
    """`4`, `2 or 4`, `1, 2 or 4`"""
    *head, last = [str(value) for value in values]
    return f"{', '.join(head)} or {last}" if head else last

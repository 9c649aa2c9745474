#!/usr/bin/env python
"""What FP8 does to one step of a recipe: `tools/study_fp8.py RECIPE [--prompts 16] [--gap] [key=value ...]`.

Traces are sampled once, in float32. Every precision then scores the same traces with the same weights, makes rewards,
advantages and the gradient of the loss of them, and is compared with float32:

    log-prob   mean |difference| over trace tokens, nats
    reward     root mean square difference, in standard deviations of the rewards within a group of traces
    advantage  correlation, and the share whose sign is another one (of those above 0.1 in size)
    gradient   norm of the difference over the norm, and cosine, over all weights

`--gap` samples again in each precision and prints the log-prob gap between rollout and training, for rollouts in it
and in the dtype of the other layers. All on this machine and on one rank, whatever layout the recipe has: a shard of a
weight would have a scale of its own. Linear layers only; FP8 is rehearsed (nrt_megatron/mcore/fp8.py).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nrt_megatron.data.batch import MicroBatch, SequenceGrid, micro_batch
from nrt_megatron.mcore import pipeline, runtime
from nrt_megatron.mcore.generate import MegatronGenerator
from nrt_megatron.mcore.model import wrap_for_training
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.objective.loss import ANSWER, TRACE, nrt_loss
from nrt_megatron.preflight import load_inputs
from nrt_megatron.recipe import ConfigError, Recipe, check, check_files, load_recipe
from nrt_megatron.rollout import Rollout, rollout
from nrt_megatron.scoring import Scored, answers_only, score, sequence_grid
from nrt_megatron.weights import fill_weights

_EDGES = dict(first_last_layers_bf16=True)


def _fp8(form: str, recipe: str, **more: Any) -> dict[str, Any]:
    return dict(fp8=form, fp8_recipe=recipe, fp8_emulation=True, **more)


PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": dict(bf16=True),
    "hybrid tensorwise": _fp8("hybrid", "tensorwise"),
    "hybrid tensorwise, first and last layer not": _fp8("hybrid", "tensorwise", **_EDGES),
    "e4m3 tensorwise": _fp8("e4m3", "tensorwise"),
    "e4m3 blockwise": _fp8("e4m3", "blockwise"),
    "e4m3 blockwise, first and last layer not": _fp8("e4m3", "blockwise", **_EDGES),
    "e4m3 blockwise, bf16": _fp8("e4m3", "blockwise", bf16=True),
}
"""Name -> fields of `policy.megatron_cfg`."""


@dataclass(frozen=True)
class Measured:
    """One precision's view of the same traces."""

    trace_log_probs: Tensor
    """[n] of all sampled tokens, in the order of the grid"""
    scored: Scored
    gradient: dict[str, Tensor]


class Study:
    """A recipe's model and some of its questions, on one rank."""

    def __init__(self, recipe: Recipe, num_prompts: int):
        self.place = runtime.initialize(recipe)
        self.recipe, self.inputs = recipe, load_inputs(recipe)
        self.examples = self.inputs.train.take(num_prompts)[0]
        self.marker_ids = self.inputs.tokenizer.marker_ids

    def policy(self, fields: dict[str, Any]) -> MegatronPolicy:
        """The recipe's initial weights in a precision. Raises ConfigError where the model has none."""
        cfg = replace(self.recipe.policy.megatron_cfg, **fields)
        section = replace(self.recipe.policy, megatron_cfg=cfg)
        check_files(replace(self.recipe, policy=section))
        policy = MegatronPolicy(self.place, section, self.inputs.shape, num_updates=1)
        fill_weights(policy, replace(self.recipe, policy=section), self.inputs)
        policy.ddp = wrap_for_training(policy.chunks, cfg)
        return policy

    def sample(self, policy: MegatronPolicy, fp8: str = "same") -> Rollout:
        """K traces a question, the same random numbers every time."""
        tokenizer = self.inputs.tokenizer
        generator = MegatronGenerator(
            self.place,
            policy.chunks,
            replace(self.recipe.policy.generation, fp8=fp8),
            marker_ids=self.marker_ids,
            stop_ids=tokenizer.stop_ids,
            vocab_size=self.inputs.shape.vocab_size,
            seed=self.recipe.nrt.seed,
        )
        return rollout(generator, self.examples, self.recipe, draw=1)

    def batches(self, grid: SequenceGrid) -> list[MicroBatch]:
        """The grid in its own order."""
        size, temperature = self.recipe.policy.train_micro_batch_size, self.recipe.policy.generation.temperature
        return [micro_batch(grid, rows, temperature=temperature) for rows in torch.arange(len(grid)).split(size)]

    def log_probs(self, policy: MegatronPolicy, grid: SequenceGrid, kind: int) -> Tensor:
        """[n] of all tokens of a kind."""
        batches = self.batches(grid)
        return torch.cat([r.log_probs[b.kind == kind] for b, r in zip(batches, policy.log_probs(batches), strict=True)])

    def measure(self, policy: MegatronPolicy, traces: Rollout) -> Measured:
        """Scores the traces by whole forwards, and takes the gradient of a first update on them."""
        grid = sequence_grid(score(traces, self.recipe.nrt), self.marker_ids)
        alone = answers_only(self.examples, self.marker_ids, self.place.device)
        generated = traces.generated
        mask = score(traces, self.recipe.nrt).answer_mask.view_as(generated.answer_log_probs)  # [G, K, A]
        with_trace = torch.zeros_like(generated.answer_log_probs)
        with_trace[mask] = self.log_probs(policy, grid, ANSWER)
        without = torch.zeros_like(generated.baseline_log_probs)
        without[mask[:, 0]] = self.log_probs(policy, alone, ANSWER)
        generated = replace(generated, answer_log_probs=with_trace, baseline_log_probs=without)
        scored = score(replace(traces, generated=generated), self.recipe.nrt)
        grid = sequence_grid(scored, self.marker_ids)
        return Measured(self.log_probs(policy, grid, TRACE), scored, self._gradient(policy, grid))

    def _gradient(self, policy: MegatronPolicy, grid: SequenceGrid) -> dict[str, Tensor]:
        batches = policy.with_own_log_probs(self.batches(grid))
        batches = [replace(batch, sampler_log_probs=None) for batch in batches]  # ratios of 1
        loss_fn = partial(nrt_loss, settings=self.recipe.nrt)
        pipeline.run(policy.ddp, batches, loss_fn, device=self.place.device, stopwatch=policy.forwards)
        return {name: p.main_grad.clone() for chunk in policy.chunks for name, p in chunk.named_parameters()}

    def gap(self, policy: MegatronPolicy, fp8: str) -> tuple[float, float]:
        """Mean and largest |log pi_trainer - log pi_sampler| over sampled tokens."""
        grid = sequence_grid(score(self.sample(policy, fp8), self.recipe.nrt), self.marker_ids)
        sampler = torch.cat([batch.old_log_probs[batch.kind == TRACE] for batch in self.batches(grid)])
        gap = (self.log_probs(policy, grid, TRACE) - sampler).abs()
        return float(gap.mean()), float(gap.max())


def compare(exact: Measured, other: Measured, traces: int) -> dict[str, float]:
    """The numbers of a row; traces: K."""
    spread = exact.scored.rewards.view(-1, traces).std(dim=1).mean()
    a, b = exact.scored.advantages.double(), other.scored.advantages.double()
    large = a.abs() > 0.1
    pairs = [(exact.gradient[name], other.gradient[name]) for name in exact.gradient]
    apart = sum(float((g - h).double().pow(2).sum()) for g, h in pairs)
    along = sum(float((g.double() * h).sum()) for g, h in pairs)
    size, other_size = (sum(float(pair[i].double().pow(2).sum()) for pair in pairs) for i in (0, 1))
    return {
        "log-prob": float((other.trace_log_probs - exact.trace_log_probs).abs().mean()),
        "reward": float((other.scored.rewards - exact.scored.rewards).pow(2).mean().sqrt() / spread),
        "advantage": float(torch.corrcoef(torch.stack([a, b]))[0, 1]),
        "signs": float((a.sign() != b.sign())[large].double().mean()),
        "gradient": (apart / size) ** 0.5,
        "cosine": along / (size * other_size) ** 0.5,
    }


def _recipe(path: str, overrides: list[str]) -> Recipe:
    one_rank = ["tensor_model_parallel_size=1", "pipeline_model_parallel_size=1", "sequence_parallel=false"]
    fixed = [f"policy.megatron_cfg.{field}" for field in one_rank] + ["cluster.gpus_per_node=0", "cluster.cpu_ranks=1"]
    recipe = load_recipe(path, [], [*overrides, *fixed])
    check(recipe)
    check_files(recipe)
    return recipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--prompts", type=int, default=16, help="questions, the first of the training data")
    parser.add_argument("--gap", action="store_true", help="also sample in every precision")
    args = parser.parse_args()
    try:
        study = Study(_recipe(args.recipe, args.overrides), args.prompts)
    except ConfigError as error:
        print(f"study_fp8: {error}", file=sys.stderr)
        return 2
    traces, exact = None, None
    columns = ("log-prob", "reward", "advantage", "signs", "gradient", "cosine")
    gaps = ("gap, same", "largest", "gap, rollout without FP8", "largest") if args.gap else ()
    print(f"| precision | {' | '.join((*columns, *gaps))} |\n|{'---|' * (1 + len(columns) + len(gaps))}", flush=True)
    for name, fields in PRECISIONS.items():
        policy = None  # frees the last one before the next is built
        try:
            policy = study.policy(fields)
        except ConfigError as error:
            print(f"study_fp8: no {name}: {error}", file=sys.stderr)
            continue
        traces = traces or study.sample(policy)
        measured = study.measure(policy, traces)
        exact = exact or measured
        row = [f"{v:.4f}" for v in compare(exact, measured, study.recipe.nrt.num_generations_per_prompt).values()]
        if args.gap:
            pairs = [study.gap(policy, "same"), study.gap(policy, "none") if "fp8" in fields else ("", "")]
            row += [f"{value:.1e}" if value != "" else "" for pair in pairs for value in pair]
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    runtime.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())

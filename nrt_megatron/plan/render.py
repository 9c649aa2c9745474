"""A plan as text for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from nrt_megatron.plan import efficiency
from nrt_megatron.plan.result import Phase, Plan

_MEMORY = ("weights", "gradients", "optimizer", "activations", "kv_cache", "workspace", "total")
_WIDTH = 120  # where the output is no terminal


def show(plan: Plan, console: Console | None = None) -> None:
    """Prints the plan to the console (default: stdout)."""
    console = console or Console()
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(f"[bold]{plan.recipe}[/] on {plan.gpus} x {plan.hardware}: {_layout(plan.layout)}", highlight=False)
    console.print(_memory(plan))
    console.print(_verdict(plan), highlight=False, soft_wrap=True)
    console.print(_phases(plan))
    for line in _details(plan):
        console.print(line, highlight=False, soft_wrap=True)


def _layout(sizes: dict[str, int]) -> str:
    names = {"tensor": "TP", "context": "CP", "pipeline": "PP", "chunks": "VPP", "data": "DP"}
    return " x ".join(f"{names[key]} {size}" for key, size in sizes.items() if size > 1) or "one rank"


def _memory(plan: Plan) -> Table:
    table = Table(title="GiB on each GPU of a stage; total is the peak: activations and KV cache are not there at once")
    for heading in ("stage", "layers", "parameters", *(name.replace("_", " ") for name in _MEMORY)):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, stage in enumerate(plan.stages):
        sizes = (f"{getattr(stage, f'{name}_gib'):.2f}" for name in _MEMORY)
        table.add_row(str(index), str(stage.layers), f"{stage.parameters:,}", *sizes)
    return table


def _verdict(plan: Plan) -> str:
    usable = f"{plan.peak_gib:.1f} of {plan.memory_gib:.1f} GiB ({efficiency.RESERVED_GIB:g} more are reserved)"
    if plan.fits:
        return f"[green]fits:[/] {usable}"
    return f"[red]does not fit:[/] {usable}\nfirst change to try: {plan.first_change}"


def _phases(plan: Plan) -> Table:
    table = Table(title="A step")
    for heading in ("phase", "seconds", "tokens", "PFLOP", "tokens/s/GPU", "TFLOP/s/GPU"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    phases = {"rollout": plan.rollout, "scoring": plan.scoring, f"update x {plan.num_updates}": plan.update}
    for name, phase in phases.items():
        if phase.seconds:
            table.add_row(name, *_row(phase))
    return table


def _row(phase: Phase) -> list[str]:
    values = (phase.tokens, phase.flops / 1e15, phase.tokens_per_second_per_gpu, phase.tflops_per_gpu)
    return [_short(phase.seconds, ".1f"), *(_short(value, ".0f") for value in values)]


def _short(value: float, spec: str) -> str:
    """Two digits of a small number, which would be shown as 0 otherwise."""
    return f"{value:,{spec}}" if value >= 1 or not value else f"{value:.2g}"


def _rollout(plan: Plan) -> list[str]:
    if plan.rollout_layout is None:
        return []
    weights = max(stage.rollout_weights_gib for stage in plan.stages)
    seconds = _short(plan.reshard_seconds, ".1f")
    return [
        f"rollout at {_layout(plan.rollout_layout)}: {weights:.1f} GiB of weights of its own, part of the total;"
        f" before it a GPU receives {plan.reshard_gib:.1f} GiB of them, {seconds} s with their check"
    ]


def _details(plan: Plan) -> list[str]:
    causes = ", ".join(f"{name.replace('_', ' ')} {s:.2f}" for name, s in plan.update_seconds.items() if s >= 0.005)
    causes = causes or f"{sum(plan.update_seconds.values()):.1g} in all"
    sent = ", ".join(f"{kind} {gib:,.1f}" for kind, gib in plan.traffic_gib.items() if gib)
    tokens = ", ".join(f"{name} {count:,.0f}" for name, count in plan.tokens_per_sequence.items())
    return [
        *_rollout(plan),
        f"step {_short(plan.step_seconds, '.1f')} s; {plan.num_steps} steps"
        f" {_short(plan.run_gpu_hours, '.0f')} GPU-hours, {_short(plan.run_gpu_hours / plan.gpus, '.1f')} hours",
        f"one update, seconds: {causes}; pipeline bubble {plan.pipeline_bubble:.1%}",
        f"one update, GiB sent by a GPU: {sent or 'nothing'}",
        f"assumed tokens a sequence: {tokens}; not counted: evaluation, checkpoints, data, stragglers",
        f"assumed shares of nominal rates: matrix products {efficiency.MATMUL:g}, attention {efficiency.ATTENTION:g},"
        f" memory {efficiency.MEMORY:g}, network {efficiency.NETWORK:g}; host"
        f" {efficiency.HOST_SECONDS_PER_LAYER * 1e3:g} ms a layer (sources: nrt_megatron/plan/efficiency.py)",
    ]

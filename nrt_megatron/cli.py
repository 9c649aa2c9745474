"""The `nrt` command: parse, call, print. Rooms are imported inside the commands, so that help stays instant.

A new command is a function here with a docstring, decorated with `@app.command()`, that imports what it calls.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Annotated, NoReturn, Optional

import typer

from nrt_megatron import __version__

if TYPE_CHECKING:
    from nrt_megatron.recipe import Recipe

USER_MISTAKE = 2
"""Exit code of whatever the user can put right; typer's own usage errors have it too."""

app = typer.Typer(
    name="nrt",
    help="Native Reasoning Training on Megatron-Core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"nrt-megatron {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """Native Reasoning Training on Megatron-Core."""


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML recipe of the run.")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="Dotted keys, e.g. nrt.seed=7.")
    ] = None,
    config: Annotated[
        Optional[list[str]],
        typer.Option("--config", metavar="OVERLAY", help="YAML laid over the recipe; repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")] = False,
) -> None:
    """Train a model, or continue the run in its run directory.

    Starts its own ranks, one per GPU or cluster.cpu_ranks, and joins them where torchrun or srun has started them.
    """
    from nrt_megatron import stopping

    stopping.leave()  # before the imports that take long
    from nrt_megatron import launch
    from nrt_megatron.quickstart import check_name
    from nrt_megatron.recipe import check, check_all, check_values, load_recipe, print_notice

    launch.adopt_slurm(os.environ)
    speaks = launch.is_first_rank(os.environ)
    try:
        resolved = load_recipe(recipe, config or [], overrides or [], print_notice if speaks else lambda _: None)
        check_values(resolved)
        checks = [partial(check, resolved), partial(check_name, resolved.prepare)]
        if dry_run:
            check_all(*checks)
            _print_resolved(resolved)
            return
        checks += [partial(launch.check_ranks, resolved, os.environ)]
        check_all(*checks, *([partial(_check_files_there, resolved)] if speaks else []))
        launch.prepare_environment(resolved, os.environ)
        if speaks:
            _prepare(resolved)
        code = launch.run(resolved)
    except ValueError as error:
        _exit_silently_unless(speaks, error)
        raise
    raise typer.Exit(code)


def _exit_silently_unless(speaks: bool, error: ValueError) -> None:
    """Of all the ranks that find the same mistake, the first one says it."""
    from nrt_megatron.recipe import ConfigError

    if isinstance(error, ConfigError) and not speaks:
        time.sleep(2)  # launchers end all ranks when the first one is gone: let the one that speaks finish
        raise typer.Exit(USER_MISTAKE)


def _check_files_there(recipe: Recipe) -> None:
    """The files that a recipe names, before anything is made; but not those that its preparation makes."""
    from nrt_megatron.quickstart import directory_of
    from nrt_megatron.recipe import check_files

    check_files(recipe, to_be_made=directory_of(recipe.prepare))


def _print_resolved(recipe: Recipe) -> None:
    """The recipe on stdout; on stderr what a real run would miss here, unless a preparation is to make it."""
    from nrt_megatron.recipe import ConfigError, MissingFileError, SeveralErrors, print_notice, to_yaml

    try:
        _check_files_there(recipe)
    except ConfigError as error:
        found = error.errors if isinstance(error, SeveralErrors) else [error]
        if not all(isinstance(one, MissingFileError) for one in found):
            raise
        print_notice(f"not on this machine yet: {error}")
    print(to_yaml(recipe), end="")


def _prepare(recipe: Recipe) -> None:
    """Everything that one process does before the ranks start: preparation, then the checks that read files."""
    from nrt_megatron.preflight import preflight
    from nrt_megatron.recipe import check_files

    if recipe.prepare is not None:
        from nrt_megatron.quickstart import prepare

        prepare(recipe.prepare)
        check_files(recipe)
    preflight(recipe)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML recipe of the run.")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="Dotted keys, e.g. nrt.seed=7.")
    ] = None,
    config: Annotated[
        Optional[list[str]],
        typer.Option("--config", metavar="OVERLAY", help="YAML laid over the recipe; repeatable."),
    ] = None,
    hardware: Annotated[
        str, typer.Option("--hardware", metavar="GPU", help="h100, h200, b200, or a YAML file.")
    ] = "h100",
    training_only: Annotated[
        bool, typer.Option("--training-only", help="One plain update of full sequences; needs no data.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    prompt_tokens: Annotated[float, typer.Option(metavar="N", min=1, help="Average prompt.")] = 300,
    trace_tokens: Annotated[
        Optional[float], typer.Option(metavar="N", min=1, help="Average trace; default: the limit.")
    ] = None,
    answer_tokens: Annotated[float, typer.Option(metavar="N", min=1, help="Average answer.")] = 415,
) -> None:
    """Estimate memory, time and GPU-hours of a run, without any GPU."""
    import json
    from pathlib import Path

    from nrt_megatron import plan as planner
    from nrt_megatron.plan.render import show
    from nrt_megatron.recipe import load_recipe, print_notice, world_size

    unused = ["data.train=unused"] if training_only else []
    loaded = load_recipe(recipe, config or [], [*unused, *(overrides or [])])
    planned = planner.plan(
        loaded,
        planner.load_hardware(hardware),
        training_only,
        name=Path(recipe).stem,
        prompt_tokens=prompt_tokens,
        trace_tokens=trace_tokens,
        answer_tokens=answer_tokens,
    )
    if not loaded.cluster.gpus_per_node:
        ranks = f"{world_size(loaded)} CPU ranks" if world_size(loaded) > 1 else "one CPU rank"
        print_notice(f"cluster.gpus_per_node = 0: {ranks} planned as if each were an {planned.hardware}")
    print(json.dumps(planned.as_json(), indent=2)) if as_json else show(planned)


@app.command()
def replay(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A directory below replay/ of a run.")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="Of the run's recipe.")
    ] = None,
) -> None:
    """Run the batch with which a run stopped again, and print what is not finite.

    In one process; under torchrun at the recipe's layout.
    """
    from pathlib import Path

    from nrt_megatron import launch
    from nrt_megatron.recipe import ConfigError, check, load_recipe

    recipe = Path(directory) / "recipe.yaml"
    if not recipe.is_file():
        raise ConfigError(f"{directory}: holds no recipe.yaml; give a directory below replay/ of a run")
    resolved = load_recipe(recipe, [], overrides or [])
    check(resolved)
    launch.prepare_environment(resolved, os.environ)
    from nrt_megatron import replay as room

    room.replay(Path(directory), resolved)


@app.command()
def convert(
    hf_dir: Annotated[
        str, typer.Argument(metavar="HF_DIR", help="Hugging Face directory of a Llama or Mistral model.")
    ],
    out_dir: Annotated[str, typer.Argument(metavar="OUT_DIR", help="New directory for the Megatron checkpoint.")],
    add_token: Annotated[
        Optional[list[str]],
        typer.Option("--add-token", metavar="T", help="Token to add to tokenizer and embeddings; repeatable."),
    ] = None,
    init_from: Annotated[
        str, typer.Option("--init-from", metavar="X", help="Rows of added tokens: eos, mean, or a text.")
    ] = "mean",
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Weights alone.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare logits with transformers, both models in memory in turn."),
    ] = False,
    dtype: Annotated[
        Optional[str], typer.Option("--dtype", metavar="float32|bfloat16", help="Cast the weights.")
    ] = None,
) -> None:
    """Convert a Hugging Face model to a Megatron checkpoint that loads at any layout."""
    from nrt_megatron.mcore.convert_checkpoint import convert_hf_to_megatron
    from nrt_megatron.recipe import print_notice

    convert_hf_to_megatron(
        hf_dir,
        out_dir,
        add_token=add_token or [],
        init_from=init_from,
        tokenizer=not no_tokenizer,
        dtype=dtype,
        verify=verify,
    )
    print_notice(f"wrote {out_dir}; a run starts from it with policy.model.path={out_dir}")


@app.command()
def export(
    checkpoint_dir: Annotated[
        str, typer.Argument(metavar="CHECKPOINT_DIR", help="Checkpoint of nrt convert or nrt train.")
    ],
    out_dir: Annotated[str, typer.Argument(metavar="OUT_DIR", help="New directory for the release.")],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare logits with transformers, both models in memory in turn."),
    ] = False,
    dtype: Annotated[
        Optional[str], typer.Option("--dtype", metavar="float32|bfloat16", help="Cast the weights.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weights file.")] = "5GB",
) -> None:
    """Export a checkpoint as a Hugging Face model, ready to release."""
    from nrt_megatron.mcore.convert_checkpoint import export_to_hf
    from nrt_megatron.recipe import print_notice

    export_to_hf(checkpoint_dir, out_dir, dtype=dtype, max_shard_size=max_shard_size, verify=verify)
    print_notice(f"wrote {out_dir}, a Hugging Face model")


def _interrupted(signum: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


def main() -> None:
    """Entry point of `nrt`. Exit codes: 0, 1 (a failure), 2 (a mistake of the user), 128 + n (ended by signal n);
    of `nrt train` also 75 (asked to stop by SIGTERM or SIGUSR1; the same command goes on)."""
    signal.signal(signal.SIGTERM, _interrupted)  # unwinds, so that temporary files go and ranks are ended
    signal.signal(signal.SIGINT, _interrupted)
    try:
        app()
    except ValueError as error:
        from nrt_megatron.recipe import ConfigError

        if not isinstance(error, ConfigError):
            raise
        print(f"nrt: {error}", file=sys.stderr)
        sys.exit(USER_MISTAKE)


if __name__ == "__main__":
    main()

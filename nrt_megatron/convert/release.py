"""What a release needs beside its weights: chat template with trace markers, generation config, model card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from nrt_megatron.checkpoints import CheckpointMeta
from nrt_megatron.convert.chat_template import from_text, with_traces
from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.tokenizer_files import VOCABULARIES
from nrt_megatron.data.files import TokenizerFiles, write_json
from nrt_megatron.data.tokenizer import load_tokenizer
from nrt_megatron.recipe import Recipe, from_yaml

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"

_CARD_METRICS = (
    "eval/accuracy",
    "eval/accuracy_greedy",
    "eval/answer_prob",
    "reward/trace_mean",
    "trace/length_mean",
    "trace/entropy",
    "loss",
)


@dataclass(frozen=True)
class Run:
    """What is known of the training run that a checkpoint comes from."""

    recipe: Recipe
    recipe_text: str
    rows: list[dict[str, Any]]
    """metrics.jsonl up to the checkpoint's step; empty when there is none."""

    @classmethod
    def of(cls, checkpoint: Path, step: int) -> Optional[Run]:
        """Reads `recipe.yaml` of the checkpoint and `metrics.jsonl` of its run directory; None without a recipe."""
        recipe = checkpoint / RECIPE
        if not recipe.is_file():
            return None
        text = recipe.read_text("utf-8")
        metrics = checkpoint.resolve().parent.parent / METRICS
        rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
        return cls(from_yaml(text, str(recipe)), text, [row for row in rows if row.get("step", 0) <= step])


def has_tokenizer(release: Path) -> bool:
    """Whether the release has a vocabulary, and not stop ids alone."""
    return any((release / name).is_file() for name in VOCABULARIES)


def write_chat_template(release: Path, run: Optional[Run]) -> None:
    """Puts the trace markers of the run into the tokenizer's chat template, or makes one from the recipe's text.

    Prompts of the released template are those of training, token for token. Without a run, or without a
    tokenizer, nothing changes.
    """
    if run is None or not has_tokenizer(release):
        return
    files, settings, text = (
        TokenizerFiles(release),
        run.recipe.policy.tokenizer,
        run.recipe.data.prompt_template,
    )
    if files.chat_template is not None and text in (None, "chat"):
        template = with_traces(files.chat_template, settings.trace_open, settings.marker)
    else:
        tokenizer, text = load_tokenizer(release, settings), text or "{question}"
        bos = bool(tokenizer.bos_ids) and not text.startswith(tokenizer.decode(tokenizer.bos_ids))
        template = from_text(text, settings.trace_open, settings.marker, bos)
    (release / "chat_template.jinja").write_text(template, "utf-8")
    config = files.read_json("tokenizer_config.json")
    if config.pop("chat_template", None) is not None:
        write_json(release / "tokenizer_config.json", config)


def write_input_names(release: Path) -> None:
    """Says in tokenizer_config.json that these models take no `token_type_ids`, where nothing is said.

    Without it, transformers' general tokenizer class makes them and `generate(**tokenizer(text))` fails.
    """
    config = TokenizerFiles(release).read_json("tokenizer_config.json")
    if config and "model_input_names" not in config:
        write_json(
            release / "tokenizer_config.json",
            {**config, "model_input_names": ["input_ids", "attention_mask"]},
        )


def write_generation_config(release: Path, shape: ModelShape, run: Optional[Run]) -> None:
    """Adds a `generation_config.json` where the source had none: the ids that open and end a text."""
    path = release / "generation_config.json"
    if path.is_file():
        return
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: shape.original[name] for name in names if shape.original.get(name) is not None}
    if run is not None and has_tokenizer(release):
        stops = list(load_tokenizer(release, run.recipe.policy.tokenizer).stop_ids)
        ids["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    write_json(path, {"_from_model_config": True, **ids})


def write_model_card(release: Path, meta: CheckpointMeta, shape: ModelShape, run: Optional[Run]) -> None:
    """Writes README.md: what the model is, how it was trained, on what, and how it measured."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += ["tags:", "- native-reasoning-training", "---", "", f"# {release_title(run)}", ""]
    lines += [f"A {shape.family} model of {shape.num_layers} layers, hidden size {shape.hidden_size} and"]
    lines += [f"{shape.vocab_size} tokens, stored in {shape.dtype}."]
    lines += (
        _training(run, meta.step) if run else ["", "Converted without training: the weights are those of its source."]
    )
    (release / "README.md").write_text("\n".join(lines) + "\n", "utf-8")


def release_title(run: Optional[Run]) -> str:
    """The run's name, which is that of its directory."""
    return Path(run.recipe.run_dir).name if run and run.recipe.run_dir else "Model"


def _training(run: Run, step: int) -> Iterator[str]:
    recipe, policy = run.recipe, run.recipe.policy
    yield ""
    yield f"Trained with Native Reasoning Training (arXiv 2602.11549), reward scheme `{recipe.nrt.reward_scheme}`,"
    yield f"for {step} of {recipe.nrt.max_num_steps} steps of {recipe.nrt.num_prompts_per_step} questions with"
    yield f"{recipe.nrt.num_generations_per_prompt} traces each."
    yield "The license is that of the model and data it started from."
    yield from [
        "",
        f"- Started from: `{policy.model.path or 'random weights'}`",
        f"- Data: `{recipe.data.train}`",
    ]
    if recipe.data.validation:
        yield f"- Held-out data: `{recipe.data.validation}`"
    yield from ["", "## Format", ""]
    opening = policy.tokenizer.trace_open
    yield (
        f"The prompt ends with `{opening!r}`, which opens the trace." if opening else "The trace follows the prompt."
    )
    yield f"The model writes the trace, the marker `{policy.tokenizer.marker}`, and the answer. The chat template does"
    yield "this, and puts a past trace given as `reasoning_content` of an assistant message before its answer."
    yield from _measured(run.rows)
    yield from ["", "## Recipe", "", "```yaml", *run.recipe_text.rstrip().splitlines(), "```"]


def _measured(rows: list[dict[str, Any]]) -> Iterable[str]:
    """A table of first and last values; the rows stop at the checkpoint's step."""
    table = []
    for name in _CARD_METRICS:
        found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if found:
            (first_step, first), (last_step, last) = found[0], found[-1]
            table.append(f"| `{name}` | {first:.4g} (step {first_step}) | {last:.4g} (step {last_step}) |")
    if not table:
        return ["", "No metrics of the run were beside the checkpoint."]
    return ["", "## Measured in training", "", "| metric | first | last |", "|---|---|---|", *table]

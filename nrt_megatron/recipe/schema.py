"""Every recipe key, its type and its default, in one place.

Sections follow NeMo-RL's recipes; `policy.megatron_cfg` carries Megatron-Core's own names. A default lives here
(`policy.megatron_cfg`: in `megatron.py`, `watch`: in `watch.py`) and nowhere else; what a value may be is in
`limits.py`. The classes are frozen: a run's recipe never changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from nrt_megatron.recipe.megatron import Megatron
from nrt_megatron.recipe.watch import Watch

MISSING = "???"  # OmegaConf's mark of a key that every recipe must set


@dataclass(frozen=True)
class NRT:
    """The objective and the shape of a step (Native Reasoning Training, arXiv 2602.11549)."""

    num_prompts_per_step: int = 256
    """Questions per step, over all data-parallel ranks."""
    num_generations_per_prompt: int = 8
    """K, the reasoning traces sampled per question. Ignored by the `sft` scheme, which samples none."""
    max_num_steps: int = 810
    """Steps (rollout, scoring, updates) of the whole run."""
    seed: int = 1234
    """Seed of weights, data order and sampling."""
    reward_scheme: str = "weighted_log_prob"
    """`log_prob`, `prob`, `geometric_mean`, `arithmetic_mean`, `weighted_inverse_prob`, `weighted_log_prob`,
    or `sft` (no trace, cross-entropy on the answer)."""
    preset: Optional[str] = None
    """`reference` or `paper`: sets the objective fields below that no recipe file and no override sets."""
    center_reward_by: str = "mean"
    """`mean` of the group, or `none`."""
    scale_reward_by: str = "std"
    """`std`, the group's sample standard deviation (divides by K-1), or `none`."""
    clip_to_baseline: bool = False
    """R' = max(0, R - f(b)): a trace is worth what it adds to the empty trace."""
    token_signal: str = "fixed"
    """Weight of an answer token: `fixed` (1), `raw` (alpha_i c_i), `normalised` (raw, centred and scaled)."""
    sequence_ratio: bool = False
    """One clamped ratio r_k per sequence on trace and token terms (paper), not per-token ratios on traces."""
    trace_loss_weight: float = 1.0
    """Factor of the policy gradient on trace tokens."""
    format_loss_weight: float = 0.3
    """Factor of the cross-entropy on marker tokens the policy did not produce."""
    token_loss_weight: float = 1.0
    """Factor of the answer's likelihood term."""
    ratio_clip_min: float = 0.8
    """Lower bound of the clamped ratio (an absolute ratio, not an epsilon)."""
    ratio_clip_max: float = 1.28
    """Upper bound of the clamped ratio."""
    ratio_drop_min: float = 0.8
    """A token with A < 0 and a ratio below this is dropped."""
    ratio_drop_max: float = 1.28
    """A token with A > 0 and a ratio above this is dropped."""
    loss_normalizer: float = 512.0
    """Token sums are divided by this and by the number of sequences of the global batch."""
    log_prob_error: float = 0.0
    """Standard error of an answer token's log-prob, in nats, from the precision of the model. A group whose rewards
    differ by no more than it explains has advantages of 0 and is counted: its noise is not scaled up. 0: float32's."""
    max_inverse_prob_weight: float = 1e6
    """Cap of 1/b_i in `weighted_inverse_prob`; capped tokens are counted."""
    empty_trace_penalty: float = 0.0
    """Subtracted from the reward of a trace without tokens, before centring."""
    truncated_trace_penalty: float = 0.0
    """Subtracted from the reward of a trace cut at the limit, before centring."""
    rollout_importance_sampling: bool = False
    """Weigh each trace token by pi_trainer / pi_sampler, both before the step's first update, for samplers that compute
    otherwise than the trainer; ratios are then to the trainer's own log-probs, which cost one more forward a step."""
    rollout_importance_cap: float = 2.0
    """Truncates these weights."""
    train_forced_marker: bool = False
    """Policy gradient on marker tokens that were forced, as the reference does."""
    max_skipped_updates: int = 5
    """An update whose loss or gradient is not finite is skipped; after this many in a row the run stops, and saves the
    batch for `nrt replay`."""


@dataclass(frozen=True)
class Model:
    """The model: a directory, or an inline Hugging Face config for random weights."""

    path: Optional[str] = None
    """Directory of a Hugging Face checkpoint (safetensors), or of a checkpoint written by `nrt convert`."""
    config: Optional[dict[str, Any]] = None
    """A Hugging Face `config.json` inline: weights start random. Exclusive with `path`."""
    shape: Optional[dict[str, Any]] = None
    """The `config.json` of the model at `path`, inline: `nrt plan` reads it where `path` is not on this machine, and
    a model at `path` that differs from it is refused."""


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids, and the end-of-trace marker."""

    path: Optional[str] = None
    """Directory with `tokenizer.json` or SentencePiece `tokenizer.model`. Default: `policy.model.path`."""
    trace_open: str = ""
    """Text appended to the prompt to open the trace, e.g. `<think>`."""
    marker: str = "<|response_start|>"
    """End-of-trace marker between trace and answer: one token, or a fixed few."""
    add_marker: bool = False
    """Add the marker to the vocabulary when the tokenizer does not know it as a special token."""
    require_single_token_marker: bool = True
    """Refuse a marker that the tokenizer splits into several tokens."""
    marker_init: str = "mean"
    """Embedding of an added marker: `mean`, `eos`, or a text whose tokens are averaged."""


@dataclass(frozen=True)
class SequencePacking:
    """How the sequences of a group are laid out for the update."""

    enabled: bool = False
    """Pack the traces of a prompt behind one copy of the prompt (a tree with a block mask)."""


@dataclass(frozen=True)
class Generation:
    """Sampling of traces."""

    max_new_tokens: int = 2048
    """Trace limit in tokens, marker excluded; a trace that reaches it is flagged as truncated."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability; 1: off."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0: off."""
    max_batch_size: int = 1024
    """Traces in one forward on a data-parallel rank. Where a step has more, as many such batches as there are
    pipeline stages are in flight at a time, each with a KV cache of its own; prompts that wait take the place of traces
    that end."""
    max_cache_tokens: Optional[int] = None
    """Rows times columns of the KV cache of a batch: of short prompts and answers more traces are decoded together than
    of long ones. null: `max_batch_size` rows, however long."""
    max_tokens_per_forward: int = 32768
    """Prompts are prefilled and answers scored in slices of at most this many tokens: bounds the activations."""
    fp8: str = "same"
    """With `policy.megatron_cfg.fp8`: linear layers of rollout and scoring run in it as in training (`same`), or in the
    dtype of the other layers (`none`)."""
    tensor_model_parallel_size: Optional[int] = None
    """Ranks that share each layer in rollout and evaluation; null: as in training. Where this or the next differs from
    training, every rank holds its part of the weights once more, and they are moved before each rollout."""
    pipeline_model_parallel_size: Optional[int] = None
    """Stages of consecutive layers in rollout and evaluation; null: as in training."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW."""

    lr: float = 2e-6
    """Learning rate after the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of a decay."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-15
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""


@dataclass(frozen=True)
class Scheduler:
    """Learning rate over the updates of the run."""

    lr_decay_style: str = "constant"
    """Megatron's: `constant`, `linear`, `cosine`."""
    lr_warmup_fraction: float = 0.1
    """Share of all updates in which the learning rate rises to `lr`; the first update's rate is above 0."""


@dataclass(frozen=True)
class Policy:
    """The model, how it is cut, sampled and updated."""

    model: Model = field(default_factory=Model)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    train_global_batch_size: int = 512
    """Sequences per update: a multiple of K x data-parallel ranks that divides the step's sequences."""
    train_micro_batch_size: int = 1
    """Sequences per forward and backward on one data-parallel rank."""
    max_total_sequence_length: int = 8192
    """Prompt, trace, marker and answer together, in tokens."""
    megatron_cfg: Megatron = field(default_factory=Megatron)
    sequence_packing: SequencePacking = field(default_factory=SequencePacking)
    generation: Generation = field(default_factory=Generation)
    optimizer: Optimizer = field(default_factory=Optimizer)
    scheduler: Scheduler = field(default_factory=Scheduler)


@dataclass(frozen=True)
class Data:
    """Question-answer rows."""

    train: str = MISSING
    """JSONL or Parquet file; a relative path starts in the working directory."""
    validation: Optional[str] = None
    """Held-out rows in the same form; null: no evaluation."""
    question_key: str = "question"
    """Field of a row with the question."""
    answer_key: str = "answer"
    """Field of a row with the reference answer."""
    messages_key: str = "messages"
    """Chat rows: the last assistant message is the answer, everything before it the prompt."""
    prompt_template: Optional[str] = None
    """`chat` (the tokenizer's template), or a text with `{question}`. Default: `chat` if there is one."""
    max_prompt_tokens: Optional[int] = None
    """Longer prompts are dropped and counted. Default: what `max_total_sequence_length` leaves."""
    max_answer_tokens: Optional[int] = None
    """Longer answers are dropped and counted. Default: what `max_total_sequence_length` leaves."""
    on_bad_row: str = "error"
    """`error`: refuse the file at its first malformed row; `drop`: drop such rows, counted."""
    shuffle: bool = True
    """A new order every epoch, drawn from `nrt.seed`; else the file's order."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out questions of `data.validation`."""

    every: int = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    num_questions: int = 128
    """The first so many rows of `data.validation`."""
    batch_size: int = 512
    """Questions decoded together on a data-parallel rank."""
    max_answer_tokens: int = 64
    """Limit of a generated answer, in tokens."""
    match: str = "exact"
    """What must equal the reference: `exact` (all, stripped), `last_word`, `after:TEXT` (what follows TEXT)."""


@dataclass(frozen=True)
class Checkpointing:
    """Resumable checkpoints under `<run_dir>/checkpoints`."""

    every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Older checkpoints are deleted after a newer one is complete."""
    keep_every: int = 0
    """Checkpoints of steps divisible by this are kept for good; 0: none."""
    async_save: bool = False
    """Train on while a checkpoint is written, from a copy in host memory: as many bytes as a rank writes."""


@dataclass(frozen=True)
class Logger:
    """What a run writes besides metrics.jsonl."""

    tensorboard: bool = True
    """The same metrics as TensorBoard events under `<run_dir>/tensorboard`."""
    samples_every: int = 10
    """Steps between entries of samples.jsonl; 0: none."""
    samples_num_prompts: int = 2
    """Prompts per entry, each with all its traces."""


@dataclass(frozen=True)
class Cluster:
    """Processes of the run. Under torchrun or srun their number must equal what is written here."""

    num_nodes: int = 1
    """Machines; more than one needs torchrun or srun to start the ranks."""
    gpus_per_node: int = 8
    """Ranks per node, one per GPU. 0: run on CPUs with gloo."""
    cpu_ranks: int = 1
    """Ranks in all where `gpus_per_node` is 0."""


@dataclass(frozen=True)
class Recipe:
    """A run: `nrt train RECIPE`."""

    run_dir: Optional[str] = None
    """Default: `runs/<recipe name>`."""
    prepare: Optional[str] = None
    """A built-in preparation run before training: `tiny_sum` makes the quickstart's base model and data."""
    nrt: NRT = field(default_factory=NRT)
    policy: Policy = field(default_factory=Policy)
    data: Data = field(default_factory=Data)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    logger: Logger = field(default_factory=Logger)
    watch: Watch = field(default_factory=Watch)
    cluster: Cluster = field(default_factory=Cluster)

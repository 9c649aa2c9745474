"""Llama and Mistral on Megatron-Core's GPTModel, through layer specs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.mcore import HAS_GPU
from nrt_megatron.mcore.fp8 import Scaling
from nrt_megatron.mcore.layers import RowRotaryEmbedding, block_spec
from nrt_megatron.mcore.logprobs import token_log_probs
from nrt_megatron.mcore.precision import has_te_fp8, transformer_fields
from nrt_megatron.recipe import ConfigError, Megatron


@dataclass(frozen=True)
class ScoredTokens:
    """Which tokens of a [b, s] batch get a log-prob, and from which hidden state.

    sources int64 [n]: flat index `column * b + row` of the position that predicts the token (the one
    before it; in a packed tree the first token of every branch is predicted by the prompt's end).
    targets int64 [n]: token ids. scale float [n]: inverse temperature of the logits.
    """

    sources: Tensor
    targets: Tensor
    scale: Tensor


class PolicyModel(GPTModel):
    """A GPTModel that scores chosen tokens instead of returning logits.

    Differs from GPTModel in three places: rotary positions are per row, the log-probs of `ScoredTokens` are
    taken without holding logits (`token_log_probs`), and the unpadded vocabulary is known.
    """

    def __init__(self, config: TransformerConfig, shape: ModelShape, *, padded_vocab_size: int, use_te: bool,
                 pre_process: bool, post_process: bool, vp_stage: int | None, logprob_chunk_size: int,
                 pg_collection: ProcessGroupCollection, fp8_rehearsal: Scaling | None = None):  # fmt: skip
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, use_te, vp_stage, pg_collection.pp.rank(), fp8_rehearsal),
            vocab_size=padded_vocab_size,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rotary_base,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.true_vocab_size = shape.vocab_size
        self.logprob_chunk_size = logprob_chunk_size
        device = torch.device("meta" if config.init_model_with_meta_device else torch.cuda.current_device())
        self.rotary_pos_emb = RowRotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_base=shape.rotary_base,
            scaling=shape.rope_scaling,
            device=torch.device("cpu") if device.type == "meta" else device,
            cp_group=pg_collection.cp,
        )

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        labels: ScoredTokens | None = None,
        shared_rows: bool = False,
        **kwargs,
    ) -> Tensor:
        """tokens int64 [b, s], position_ids int64 [b, s] of each token in its own sequence.

        Returns hidden states [s, b, h] before the last stage. On the last stage: with `labels`, float32
        [2, n], the log-probs and entropies of the scored tokens; without, logits of the last column,
        float [b, 1, padded vocab], gathered over the tensor-parallel group (KV cache only).
        """
        self.rotary_pos_emb.at(position_ids, shared_rows)
        return super().forward(
            input_ids=tokens, position_ids=position_ids, attention_mask=attention_mask, labels=labels, **kwargs
        )

    def _postprocess(self, hidden_states: Tensor, labels: ScoredTokens | None = None, **kwargs) -> Tensor:
        if not self.post_process or labels is None:
            return super()._postprocess(hidden_states=hidden_states, labels=None, **kwargs)
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(
                self.output_layer
            )  # with overlap_param_gather Megatron waits for the weight in it, and no forward calls it
        if self.config.sequence_parallel:
            # Each rank's gradient is already summed over the group in token_log_probs: split, don't reduce.
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        chosen = hidden_states.flatten(0, 1).index_select(0, labels.sources)  # [n, h]
        return torch.stack(
            token_log_probs(
                chosen,
                weight,
                labels.targets,
                labels.scale,
                vocab_size=self.true_vocab_size,
                group=self.pg_collection.tp,
                chunk_size=self.logprob_chunk_size,
            )
        )


def use_transformer_engine(cfg: Megatron) -> bool:
    """Whether the layers are Transformer Engine's. Raises ConfigError when asked for, or needed for FP8, and absent."""
    present = HAS_GPU and _can_import_transformer_engine()
    if not present and has_te_fp8(cfg):
        raise ConfigError(
            f"policy.megatron_cfg.fp8={cfg.fp8}: Transformer Engine (with a GPU) is not here; install the `gpu` extra, "
            "set null, or rehearse it with fp8_emulation=true"
        )
    if not present and cfg.transformer_impl == "transformer_engine":
        raise ConfigError(
            "policy.megatron_cfg.transformer_impl=transformer_engine: Transformer Engine (with a GPU) is not "
            "here; install the `gpu` extra or set transformer_impl=local"
        )
    return present and cfg.transformer_impl != "local" and not cfg.fp8_emulation


def _can_import_transformer_engine() -> bool:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


def padded_vocab_size(vocab_size: int, cfg: Megatron) -> int:
    """`vocab_size` rounded up so that every tensor-parallel rank has the same multiple of rows."""
    multiple = cfg.make_vocab_size_divisible_by * cfg.tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def transformer_config(shape: ModelShape, cfg: Megatron, **overrides) -> TransformerConfig:
    """Megatron's config for a model shape and a layout. Dropout is 0 and no field can change that."""
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    return TransformerConfig(
        **{
            **dict(
                num_layers=shape.num_layers,
                hidden_size=shape.hidden_size,
                ffn_hidden_size=shape.ffn_hidden_size,
                num_attention_heads=shape.num_attention_heads,
                num_query_groups=shape.num_query_groups,
                kv_channels=shape.kv_channels,
                normalization="RMSNorm",
                layernorm_epsilon=shape.layernorm_epsilon,
                gated_linear_unit=True,
                activation_func=F.silu,
                add_bias_linear=False,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                window_size=(shape.sliding_window - 1, 0) if shape.sliding_window else None,
                params_dtype=dtype,
                pipeline_dtype=dtype,
                bf16=cfg.bf16,
                tensor_model_parallel_size=cfg.tensor_model_parallel_size,
                pipeline_model_parallel_size=cfg.pipeline_model_parallel_size,
                virtual_pipeline_model_parallel_size=cfg.virtual_pipeline_model_parallel_size,
                context_parallel_size=cfg.context_parallel_size,
                sequence_parallel=cfg.sequence_parallel,
                recompute_granularity=cfg.recompute_granularity,
                recompute_method=cfg.recompute_method,
                recompute_num_layers=cfg.recompute_num_layers,
                # Micro-batches are as long as their longest sequence. Not with virtual stages: at PP 2 both
                # neighbours are one rank, and Megatron's exchange of shapes takes one for the other.
                variable_seq_lengths=cfg.virtual_pipeline_model_parallel_size is None,
                overlap_p2p_comm=cfg.virtual_pipeline_model_parallel_size is not None,
                moe_token_dispatcher_type="alltoall",  # no experts here, but the default refuses the line above
                batch_p2p_comm=False,
                calculate_per_token_loss=True,  # (sum, count): the loss is divided in one place
                perform_initialization=False,  # weights come from a checkpoint or from seeded_weights
                deterministic_mode=cfg.deterministic_mode,
                gradient_accumulation_fusion=False,  # Apex' kernel; on Transformer Engine: wrap_for_training
                bias_activation_fusion=HAS_GPU,  # SwiGLU keeps its input alone for the backward pass
                account_for_embedding_in_pipeline_split=cfg.account_for_embedding_in_pipeline_split,
                account_for_loss_in_pipeline_split=cfg.account_for_loss_in_pipeline_split,
                **transformer_fields(cfg),
            ),
            **overrides,
        }
    )


def build_chunks(
    shape: ModelShape, cfg: Megatron, groups: ProcessGroupCollection | None = None, **config_overrides
) -> list[PolicyModel]:
    """This rank's model chunks (one, or one per virtual pipeline stage), weights not yet filled.

    groups: those of the layout in `cfg`; None: training's.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups() if groups is None else groups
    config = transformer_config(shape, cfg, **config_overrides)
    virtual = cfg.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        chunks.append(
            PolicyModel(
                config,
                shape,
                padded_vocab_size=padded_vocab_size(shape.vocab_size, cfg),
                use_te=use_transformer_engine(cfg),
                pre_process=is_pp_first_stage(groups.pp) and is_vp_first_stage(vp_stage, virtual),
                post_process=is_pp_last_stage(groups.pp) and is_vp_last_stage(vp_stage, virtual),
                vp_stage=vp_stage,
                logprob_chunk_size=cfg.logprob_chunk_size,
                pg_collection=groups,
                fp8_rehearsal=Scaling.of(cfg),
            )
        )
        mark_tensor_parallel(chunks[-1])
    return chunks


def mark_tensor_parallel(chunk: PolicyModel) -> None:
    """Tells the optimizer which weights are shards, so that the gradient norm counts each of them.

    Megatron's local layers set the mark while drawing initial weights, which is skipped here; unmarked, the
    shards of all tensor ranks but the first would be taken for copies.
    """
    axes = {
        tensor_parallel.ColumnParallelLinear: 0,
        tensor_parallel.VocabParallelEmbedding: 0,
        tensor_parallel.RowParallelLinear: 1,
    }
    for module in chunk.modules():
        axis = next((axis for kind, axis in axes.items() if isinstance(module, kind)), None)
        if axis is not None and module.weight is not None:
            tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, axis, 1)


def wrap_for_training(chunks: list[PolicyModel], cfg: Megatron) -> list[DistributedDataParallel]:
    """Adds bf16 casting and Megatron's data parallelism around each chunk."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=cfg.overlap_grad_reduce,
        overlap_param_gather=cfg.overlap_param_gather,
        use_distributed_optimizer=cfg.use_distributed_optimizer,
        fp8_param_gather=cfg.fp8_param,
        check_for_nan_in_grad=False,  # a non-finite gradient is counted and reported by the trainer
    )
    wrapped = []
    for i, chunk in enumerate(chunks):
        module = Float16Module(chunk.config, chunk) if cfg.bf16 else chunk
        wrapped.append(DistributedDataParallel(chunk.config, ddp_config, module, disable_bucketing=i > 0))
        for layer in chunk.modules():
            # Transformer Engine's linear layers add a weight's gradient to `main_grad` themselves, in fp32 and not
            # rounded to bf16 for each micro-batch first, and mark the weight, for which Megatron's hook adds nothing
            # then. Set in the config this would hold for the output layer, too, whose gradient is not its module's
            # (`logprobs`) and may be the embedding's: those reach the hook, and are added there.
            if hasattr(layer, "fuse_wgrad_accumulation"):
                layer.fuse_wgrad_accumulation = True
    return wrapped


def unwrap(module: torch.nn.Module) -> PolicyModel:
    """The PolicyModel inside DDP and Float16Module."""
    while not isinstance(module, PolicyModel):
        module = module.module
    return module

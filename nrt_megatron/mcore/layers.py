"""Layer specs: Megatron's own, with the two modules that have to differ where Transformer Engine is absent."""

from __future__ import annotations

import copy

import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from nrt_megatron.convert.config import RopeScaling
from nrt_megatron.mcore.attention import CachingSelfAttention, SDPACoreAttention
from nrt_megatron.mcore.fp8 import Fp8ColumnParallelLinear, Fp8RowParallelLinear, Scaling


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, told to Megatron as sequence parallel.

    Megatron's `WrappedTorchNorm` refuses `sequence_parallel`; all it takes is the mark on the weight, whose
    gradients are then summed over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        device = torch.device("meta" if config.init_model_with_meta_device else torch.cuda.current_device())
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class RowRotaryEmbedding(RotaryEmbedding):
    """RoPE at given positions instead of 0..s-1, with all four Llama-3.1 scaling parameters.

    `position_ids` int64 [b, s] is set before each forward. Rows may differ (left-padded prompts on a KV
    cache, the branches of a packed tree); Megatron's own module knows one range for the whole batch.
    """

    def __init__(
        self,
        *,
        kv_channels: int,
        rotary_base: float,
        scaling: RopeScaling | None,
        device: torch.device,
        cp_group: torch.distributed.ProcessGroup | None,
    ):
        super().__init__(
            kv_channels, 1.0, rotary_base=rotary_base, use_cpu_initialization=device.type != "cuda", cp_group=cp_group
        )
        if scaling is not None:
            self.inv_freq = self._apply_scaling(
                self.inv_freq,
                factor=scaling.factor,
                low_freq_factor=scaling.low_freq_factor,
                high_freq_factor=scaling.high_freq_factor,
                original_max_position_embeddings=scaling.original_max_position_embeddings,
            )
        self.inv_freq = self.inv_freq.to(device)
        self.position_ids: Tensor | None = None
        self.shared_rows = False

    def at(self, position_ids: Tensor, shared_rows: bool) -> None:
        """Positions int64 [b, s] of the coming forward; `shared_rows` says that all rows are equal."""
        self.position_ids, self.shared_rows = position_ids, shared_rows

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group=None) -> Tensor:
        """Angles, float32 [s, b or 1, 1, d]; the arguments are Megatron's and not needed here."""
        rows = self.position_ids[:1] if self.shared_rows else self.position_ids
        angles = rows.t()[:, :, None, None].float() * self.inv_freq  # [s, b, 1, d / 2]
        return torch.cat([angles, angles], dim=-1)


def block_spec(
    config: TransformerConfig, use_te: bool, vp_stage: int | None, pp_rank: int, scaling: Scaling | None = None
) -> TransformerBlockSubmodules:
    """The decoder block of this rank's stage: Transformer Engine layers, or Megatron's local ones.

    scaling: local layers rehearse FP8, but for the first and last ones where the config leaves these out.
    """
    if use_te:
        from megatron.core.extensions.transformer_engine import TENorm

        layer: ModuleSpec = get_gpt_layer_with_transformer_engine_spec()
        norm = TENorm
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        norm = RMSNorm
    layer = copy.deepcopy(layer)
    layer.submodules.self_attention.module = CachingSelfAttention
    layer.submodules.self_attention.submodules.core_attention = SDPACoreAttention
    if not use_te:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    layers = [layer] * get_num_layers_to_build(config, vp_stage, pp_rank)
    if scaling is not None:
        first, rehearsing = get_transformer_layer_offset(config, vp_stage, pp_rank), _rehearsing(layer, scaling)
        layers = [layer if is_first_last_bf16_layer(config, first + i) else rehearsing for i in range(len(layers))]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _rehearsing(layer: ModuleSpec, scaling: Scaling) -> ModuleSpec:
    """`layer` with linear layers that round to FP8."""
    layer = copy.deepcopy(layer)
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    column, row = (
        ModuleSpec(module, params={"scaling": scaling}) for module in (Fp8ColumnParallelLinear, Fp8RowParallelLinear)
    )
    attention.linear_qkv, attention.linear_proj = column, row
    mlp.linear_fc1, mlp.linear_fc2 = column, row
    return layer

"""A Hugging Face `config.json` of the Llama or Mistral family, checked and reduced to what a model is built from.

No torch here: recipes and the planner read shapes without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

from nrt_megatron.recipe import ConfigError

DTYPES = ("float32", "bfloat16", "float16")

# What transformers assumes where a config.json is silent (LlamaConfig, MistralConfig of 4.57).
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
}

# Keys whose one supported value is the default: anything else is a computation that is not built here.
_FIXED: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "only SwiGLU models are supported"),
    "attention_bias": (False, "biases are not supported"),
    "mlp_bias": (False, "biases are not supported"),
    "partial_rotary_factor": (1.0, "rotary embeddings cover the whole head"),
    "quantization_config": (None, "save the model dequantised with save_pretrained first"),
    "is_encoder_decoder": (False, "only decoders are supported"),
}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretched frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelShape:
    """Everything that decides a model's tensors and its forward pass, under Megatron's names."""

    family: str
    """`llama` or `mistral`."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key-value heads."""
    kv_channels: int
    """Width of one head; need not be hidden_size / num_attention_heads."""
    vocab_size: int
    """Rows of the embedding, before any padding for tensor parallelism."""
    max_position_embeddings: int
    rotary_base: float
    rope_scaling: Optional[RopeScaling]
    layernorm_epsilon: float
    tie_word_embeddings: bool
    sliding_window: Optional[int]
    """Tokens a token attends to, itself included (Mistral); None: all before it."""
    dtype: str
    """`float32`, `bfloat16` or `float16`: of the weights as stored."""
    original: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The config.json this came from, kept so that a release carries its other keys unchanged."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelShape:
        """Reads a parsed `config.json`. Raises ConfigError on whatever could not be computed exactly."""
        family = config.get("model_type")
        if family not in _FAMILY_DEFAULTS:
            raise ConfigError(f"model_type: {family!r} is not supported; use a model of type llama or mistral")
        _refuse_unsupported(config)
        heads = _integer(config, "num_attention_heads")
        hidden = _integer(config, "hidden_size")
        groups = _integer(config, "num_key_value_heads", _FAMILY_DEFAULTS[family]["num_key_value_heads"] or heads)
        if heads % groups:
            raise ConfigError(f"num_key_value_heads: {groups} does not divide num_attention_heads ({heads})")
        if config.get("head_dim") is None and hidden % heads:
            raise ConfigError(f"hidden_size: {hidden} is no multiple of num_attention_heads ({heads}); set head_dim")
        base, scaling = _rope(config)
        window = config.get("sliding_window", _FAMILY_DEFAULTS[family]["sliding_window"])
        return cls(
            family=family,
            num_layers=_integer(config, "num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=_integer(config, "intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=_integer(config, "head_dim", hidden // heads),
            vocab_size=_integer(config, "vocab_size"),
            max_position_embeddings=_integer(
                config, "max_position_embeddings", _FAMILY_DEFAULTS[family]["max_position_embeddings"]
            ),
            rotary_base=base,
            rope_scaling=scaling,
            layernorm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            sliding_window=int(window) if window and family == "mistral" else None,
            dtype=_dtype(config),
            original=dict(config),
        )

    @classmethod
    def from_dir(cls, directory: str | Path) -> ModelShape:
        """Reads `config.json` of a Hugging Face directory. Raises ConfigError when there is none."""
        path = Path(directory) / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{path}: not found; give a Hugging Face model directory") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{path}: must hold a JSON object")
        return cls.from_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """A `config.json`: the original where nothing changed, its keys overwritten where a field did."""
        config = dict(self.original)
        base = ModelShape.from_hf(self.original) if self.original else None
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "original" and (base is None or getattr(base, item.name) != value):
                config.update(_hf_entries(item.name, value, config))
        if base is None:
            config["architectures"] = [f"{self.family.capitalize()}ForCausalLM"]
        return config

    def padded_vocab_size(self, divisible_by: int, tp_size: int) -> int:
        """Rows of the vocabulary-parallel matrices: a multiple of `divisible_by * tp_size`, as Megatron pads."""
        multiple = divisible_by * tp_size
        return -(-self.vocab_size // multiple) * multiple


_HF_KEYS = {
    "family": "model_type",
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
}


def _hf_entries(name: str, value: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json keys that say `name = value`, in the spelling `config` already uses."""
    if name == "dtype":
        return {("dtype" if "dtype" in config else "torch_dtype"): value}
    if name == "rope_scaling":
        return {name: value and {"rope_type": "llama3", **vars(value)}}
    return {_HF_KEYS.get(name, name): value}


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for key, (supported, reason) in _FIXED.items():
        value = config.get(key, supported)
        if value is not None and value != supported:
            shown = value if not isinstance(value, Mapping) else "{...}"
            raise ConfigError(f"{key}: {shown!r} is not supported, must be {supported!r}: {reason}")
    architectures = config.get("architectures") or []
    wrong = [name for name in architectures if not name.endswith("ForCausalLM")]
    if wrong:
        raise ConfigError(f"architectures: {wrong[0]!r} is not supported; use a ...ForCausalLM checkpoint")


def _integer(config: Mapping[str, Any], key: str, default: Optional[int] = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"{key}: missing in the model's config; add it")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key}: {value!r} must be a positive integer")
    return value


def _rope(config: Mapping[str, Any]) -> tuple[float, Optional[RopeScaling]]:
    """Base and scaling, in the spelling of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`)."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    base = float(parameters.get("rope_theta", config.get("rope_theta") or 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise ConfigError(f"{key}.rope_type: {kind!r} is not supported; use default or llama3")
    absent = [item.name for item in fields(RopeScaling) if parameters.get(item.name) is None]
    if absent:
        raise ConfigError(f"{key}.{absent[0]}: missing; rope_type llama3 needs it")
    return base, RopeScaling(
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
    )


def _dtype(config: Mapping[str, Any]) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    if value not in DTYPES:
        raise ConfigError(f"torch_dtype: {value!r} is not supported; use one of {', '.join(DTYPES)}")
    return value

"""What a plan knows of a GPU and its network: one small YAML each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from nrt_megatron.recipe import ConfigError

_SHIPPED = files("nrt_megatron.plan") / "hardware"


@dataclass(frozen=True)
class Hardware:
    """Nominal rates of one GPU; what share of them is reached is in `efficiency.py`."""

    name: str
    memory_gib: float
    memory_tb_per_second: float
    fp32_tflops: float
    bf16_tflops: float
    fp8_tflops: float
    """Dense matrix products, 10^12 operations a second."""
    gpus_per_node: int
    """Where the recipe names none (ranks on CPUs)."""
    nvlink_gb_per_second: float
    """From one GPU to the others of its node, one direction, 10^9 bytes."""
    network_gb_per_second: float
    """From one GPU to other nodes, one direction, 10^9 bytes."""


def load_hardware(name: str) -> Hardware:
    """`h100`, `h200`, `b200`, or the path of a YAML file with the same keys. Raises ConfigError."""
    source = Path(name) if name.endswith((".yaml", ".yml")) else _SHIPPED / f"{name.lower()}.yaml"
    if not source.is_file():
        shipped = sorted(entry.name.removesuffix(".yaml") for entry in _SHIPPED.iterdir())
        raise ConfigError(f"--hardware {name}: unknown; choose {', '.join(shipped)}, or give the path of a YAML file")
    try:
        values = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"--hardware {name}: not a YAML file; copy one of nrt_megatron/plan/hardware") from None
    wanted = {field.name: field.type for field in dataclasses.fields(Hardware)}
    given = set(values) if isinstance(values, dict) else set()
    if given != set(wanted):
        wrong = ", ".join(sorted(given ^ set(wanted)))
        raise ConfigError(f"--hardware {name}: keys missing or unknown: {wrong}; the keys are {', '.join(wanted)}")
    for key in set(wanted) - {"name"}:
        if isinstance(values[key], bool) or not isinstance(values[key], (int, float)) or values[key] <= 0:
            raise ConfigError(f"--hardware {name}: {key} = {values[key]!r}; set a number above 0")
    return Hardware(**values)

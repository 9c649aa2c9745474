"""Named settings of the objective, below everything that a recipe sets itself.

`reference` is what the authors' public script computes (the numbers of the recorded oracle), `paper` what the
paper writes (arXiv 2602.11549). Both are complete: they do not lean on the schema's defaults.
"""

from __future__ import annotations

from typing import Any

_SHARED: dict[str, Any] = {
    "center_reward_by": "mean",
    "scale_reward_by": "std",
    "trace_loss_weight": 1.0,
    "format_loss_weight": 0.3,
    "token_loss_weight": 1.0,
    "ratio_clip_min": 0.8,
    "ratio_clip_max": 1.28,
    "ratio_drop_min": 0.8,
    "ratio_drop_max": 1.28,
    "loss_normalizer": 512.0,
    "empty_trace_penalty": 0.0,
    "truncated_trace_penalty": 0.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "reference": {
        **_SHARED,
        "token_signal": "fixed",
        "sequence_ratio": False,
        "clip_to_baseline": False,
        "train_forced_marker": True,
        "max_inverse_prob_weight": 1e30,  # the authors' code knows no cap; this one keeps fp32 from overflowing
    },
    "paper": {
        **_SHARED,
        "token_signal": "raw",
        "sequence_ratio": True,
        "clip_to_baseline": True,
        "train_forced_marker": False,
        "max_inverse_prob_weight": 1e6,
    },
}
"""Preset name to fields of the `nrt` section."""

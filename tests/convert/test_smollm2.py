"""The conversion on a real pretrained model, where `tools/fetch_smollm2.py` has put it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.mcore.convert_checkpoint import convert_hf_to_megatron, export_to_hf
from tests.convert.builders import assert_identical, tensors
from tests.convert.test_layouts import prove

SMOLLM2 = Path(__file__).parents[2] / "runs" / "smollm2" / "base"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SMOLLM2 / "config.json").is_file(),
        reason=f"no {SMOLLM2}: run tools/fetch_smollm2.py to test on it",
    ),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple:
    """Float32 copy of the model, its checkpoint, token ids of real text, logits of transformers."""
    from transformers import AutoModelForCausalLM

    from nrt_megatron.mcore.verify import sample_ids

    root = tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2).float().eval()
    model.save_pretrained(root / "hf")
    convert_hf_to_megatron(root / "hf", root / "checkpoint", tokenizer=False)
    ids = sample_ids(SMOLLM2, ModelShape.from_dir(SMOLLM2))[None]
    with torch.no_grad():
        return root / "hf", root / "checkpoint", ids, model(ids).logits


# 9 heads in 3 groups: tensor parallel 3 is the one above 1 that divides them.
@pytest.mark.parametrize("layout", [(1, 1, None), (3, 1, None), (1, 2, None), (1, 2, 3), (3, 2, None)])
def test_every_layout(source: tuple, tmp_path: Path, layout: tuple) -> None:
    prove(layout, {"smollm2": source}, tmp_path, timeout=280)


def test_there_and_back(tmp_path: Path, capsys) -> None:
    convert_hf_to_megatron(SMOLLM2, tmp_path / "checkpoint", verify=True)
    shape = export_to_hf(tmp_path / "checkpoint", tmp_path / "back", verify=True)
    assert capsys.readouterr().err.count("same argmax 100.00%") == 2
    assert_identical(tensors(SMOLLM2), tensors(tmp_path / "back"))
    assert "lm_head.weight" not in tensors(tmp_path / "back") and shape.tie_word_embeddings
    assert replace(ModelShape.from_dir(SMOLLM2), original={}) == replace(shape, original={})

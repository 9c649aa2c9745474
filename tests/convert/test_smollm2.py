"""The conversion on a real pretrained model, where `tools/fetch_smollm2.py` has put it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.importer import import_hf
from tests.convert.builders import assert_identical, tensors
from tests.convert.test_conversion import verified
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
    import_hf(root / "hf", root / "checkpoint", tokenizer=False)
    ids = sample_ids(SMOLLM2, ModelShape.from_dir(SMOLLM2))[None]
    with torch.no_grad():
        return root / "hf", root / "checkpoint", ids, model(ids).logits


# 9 heads in 3 groups: tensor parallel 3 is the one above 1 that divides them.
@pytest.mark.parametrize("layout", [(1, 1, None), (3, 1, None), (1, 2, None), (1, 2, 3), (3, 2, None)])
def test_every_layout(source: tuple, tmp_path: Path, layout: tuple) -> None:
    prove(layout, {"smollm2": source}, tmp_path, timeout=280)


def test_there_and_back(tmp_path: Path) -> None:
    lines = verified(SMOLLM2, tmp_path)
    assert len(lines) == 2 and all("same argmax 100.00%" in line for line in lines)
    back = tmp_path / "back"
    assert_identical(tensors(SMOLLM2), tensors(back))
    assert "lm_head.weight" not in tensors(back) and ModelShape.from_dir(back).tie_word_embeddings
    assert ModelShape.from_dir(SMOLLM2) == ModelShape.from_dir(back)

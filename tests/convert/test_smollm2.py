"""The conversion on a real pretrained model, the one that `tools/fetch_smollm2.py` fetches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.importer import import_hf
from tests.convert.builders import assert_identical, tensors
from tests.convert.test_conversion import verified
from tests.convert.test_layouts import prove

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def source(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Float32 copy of the model, its checkpoint, token ids of real text, logits of transformers."""
    from transformers import AutoModelForCausalLM

    from nrt_megatron.mcore.verify import sample_ids

    root, base = tmp_path_factory.mktemp("smollm2"), smollm2_dir / "base"
    model = AutoModelForCausalLM.from_pretrained(base).float().eval()
    model.save_pretrained(root / "hf")
    import_hf(root / "hf", root / "checkpoint", tokenizer=False)
    ids = sample_ids(base, ModelShape.from_dir(base))[None]
    with torch.no_grad():
        return root / "hf", root / "checkpoint", ids, model(ids).logits


# 9 heads in 3 groups: tensor parallel 3 is the one above 1 that divides them.
@pytest.mark.parametrize("layout", [(1, 1, None), (3, 1, None), (1, 2, None), (1, 2, 3), (3, 2, None)])
def test_every_layout(source: tuple, tmp_path: Path, layout: tuple) -> None:
    prove(layout, {"smollm2": source}, tmp_path, timeout=280)


def test_there_and_back(smollm2_dir: Path, tmp_path: Path) -> None:
    base, back = smollm2_dir / "base", tmp_path / "back"
    lines = verified(base, tmp_path)
    assert len(lines) == 2 and all("same argmax 100.00%" in line for line in lines)
    assert_identical(tensors(base), tensors(back))
    assert "lm_head.weight" not in tensors(back) and ModelShape.from_dir(back).tie_word_embeddings
    assert ModelShape.from_dir(base) == ModelShape.from_dir(back)

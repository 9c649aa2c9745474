"""One checkpoint through every parallel layout: logits of transformers, and the same bits back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nrt_megatron.checkpoints import CheckpointMeta
from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.exporter import export_hf
from nrt_megatron.convert.importer import import_hf
from tests.convert.builders import VARIANTS, VOCAB, assert_identical, save_model, tensors
from tests.distributed import run_ranks

BOUND = 1e-4
LAYOUTS = [(1, 1, None), (2, 1, None), (4, 1, None), (1, 2, None), (1, 2, 2), (2, 2, None), (4, 2, None)]
"""Tensor, pipeline and virtual pipeline size."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, tuple[Path, Path, torch.Tensor, torch.Tensor]]:
    """Per variant: Hugging Face directory, converted checkpoint, token ids, logits of transformers."""
    from transformers import AutoModelForCausalLM

    found = {}
    for seed, variant in enumerate(VARIANTS):
        root = tmp_path_factory.mktemp(variant)
        hf, checkpoint = save_model(root / "hf", variant, seed=seed), root / "checkpoint"
        import_hf(hf, checkpoint, tokenizer=False)
        ids = torch.randint(0, VOCAB, (2, 80), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(hf).eval()(ids).logits
        found[variant] = (hf, checkpoint, ids, logits)
    return found


def forward(chunks: list, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits [b, s, v] on the last stage: hidden states go from stage to stage, round by round of virtual stages."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    ranks = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    stage, stages = ranks.index(dist.get_rank()), len(ranks)
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    out = None
    for number, chunk in enumerate(chunks):
        if number or stage:
            hidden = torch.empty(ids.shape[1], len(ids), chunk.config.hidden_size)
            dist.recv(hidden, ranks[stage - 1])
            chunk.set_input_tensor(hidden)
        out = chunk(ids, positions, None)
        if not chunk.post_process:
            dist.send(out.contiguous(), ranks[(stage + 1) % stages])
    if not chunks[-1].post_process:
        return None
    return tensor_parallel.gather_from_tensor_model_parallel_region(out)


def through_layout(layout: tuple, sources: dict, root: Path) -> dict[str, float]:
    """On each rank: load, compare, load again from Hugging Face, save. Largest logit difference per variant."""
    from megatron.core import dist_checkpointing

    from nrt_megatron.mcore import runtime, storage
    from nrt_megatron.mcore.hf import load_hf_weights
    from nrt_megatron.mcore.model import build_chunks
    from nrt_megatron.recipe import Megatron, Policy, Recipe

    tp, pp, vpp = layout
    cfg = Megatron(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        make_vocab_size_divisible_by=8,
    )
    place = runtime.initialize(Recipe(policy=Policy(megatron_cfg=cfg)))
    differences = {}
    for variant, (hf, checkpoint, ids, expected) in sources.items():
        shape = ModelShape.from_dir(hf)
        chunks = build_chunks(shape, cfg)
        with torch.no_grad():
            for parameter in (p for chunk in chunks for p in chunk.parameters()):
                parameter.fill_(torch.nan)
            state = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
            state = dist_checkpointing.load(state, str(checkpoint / "dist"))
            for i, chunk in enumerate(chunks):
                chunk.load_state_dict(state[f"model{i}"])
            logits = forward(chunks, ids)
            if logits is not None:
                assert not logits[..., shape.vocab_size :].any(), "padding rows are not zero"
                differences[variant] = float((logits[..., : shape.vocab_size] - expected).abs().max())
            loaded = [p.clone() for chunk in chunks for p in chunk.parameters()]
            for parameter in (p for chunk in chunks for p in chunk.parameters()):
                parameter.fill_(torch.nan)
            load_hf_weights(chunks, shape, hf, place.tp_rank, place.tp_size)
            direct = [p for chunk in chunks for p in chunk.parameters()]
            assert all(torch.equal(a, b) for a, b in zip(loaded, direct)), variant
        state = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
        writer = storage.StateWriter(state, root / variant / "dist", lambda action: action())
        writer.finish(writer.write())
    runtime.shutdown()
    return differences


def prove(layout: tuple, sources: dict, tmp_path: Path, timeout: float) -> None:
    """All ranks' logits are those of transformers, and what they save is released with the source's bits."""
    for variant in sources:
        (tmp_path / variant / "dist").mkdir(parents=True)
    results = run_ranks(layout[0] * layout[1], through_layout, layout, sources, tmp_path, timeout=timeout)
    last = {variant: difference for result in results for variant, difference in result.items()}
    assert last.keys() == sources.keys()
    assert max(last.values()) < BOUND, last
    for variant, (hf, *_) in sources.items():
        checkpoint = tmp_path / variant
        meta = CheckpointMeta(step=0, world_size=len(results), model=ModelShape.from_dir(hf).to_hf(), kind="train")
        (checkpoint / "meta.json").write_text(meta.to_json())
        export_hf(checkpoint, checkpoint / "release")
        assert_identical(tensors(hf), tensors(checkpoint / "release"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}-pp{}-vpp{}".format(*layout))
def test_every_layout_gives_the_same_logits_and_the_same_bits(layout, sources, tmp_path) -> None:
    prove(layout, sources, tmp_path, timeout=240)

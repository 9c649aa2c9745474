"""samples.jsonl from scored traces, values set by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from nrt_megatron.report import SamplesWriter, samples_of


class Letters:
    """Decodes id 0 to a, 1 to b, ..."""

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids)


def scored():
    """Two prompts, K = 2; the second answer is shorter than the first, and the padding holds nonsense."""
    half, quarter, nonsense = torch.log(torch.tensor([0.5, 0.25, 0.125]))
    return SimpleNamespace(
        rollout=SimpleNamespace(
            examples=[
                SimpleNamespace(index=7, prompt_ids=(0, 1), answer_ids=(2, 3), answer="cd"),
                SimpleNamespace(index=9, prompt_ids=(4,), answer_ids=(5,), answer="f"),
            ],
            generated=SimpleNamespace(
                trace_ids=torch.tensor([[[0, 1, 2], [-1, -1, -1]], [[3, -1, -1], [4, 5, -1]]]),
                finish=torch.tensor([[2, 0], [1, 0]]),
            ),
        ),
        log_c=torch.stack([half, quarter, quarter, half, half, nonsense, quarter, nonsense]).view(4, 2),
        log_b=torch.stack([quarter, quarter, quarter, quarter, half, nonsense, half, nonsense]).view(4, 2),
        rewards=torch.tensor([0.5, 0.25, float("nan"), 1.0]),
        advantages=torch.tensor([1.0, -1.0, 0.0, float("inf")]),
    )


def test_every_part_of_a_sample_stands_in_its_line(tmp_path):
    writer = SamplesWriter(tmp_path)
    writer.write(samples_of(scored(), Letters(), step=4, num_prompts=5))
    writer.close()
    first, second = (json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines())
    assert (first["step"], first["index"], first["prompt"], first["answer"]) == (4, 7, "ab", "cd")
    assert first["answer_tokens"] == ["c", "d"]
    assert first["b"] == pytest.approx([0.25, 0.25])
    cut, empty = first["traces"]
    assert (cut["text"], cut["ids"], cut["finish"]) == ("abc", [0, 1, 2], "length")
    assert (cut["reward"], cut["advantage"]) == (0.5, 1.0)
    assert cut["c"] == pytest.approx([0.5, 0.25])
    assert (empty["text"], empty["ids"], empty["finish"]) == ("", [], "marker")
    assert empty["c"] == pytest.approx([0.25, 0.5])
    # The padding of the shorter answer is not shown, and what is not finite is null.
    assert second["b"] == pytest.approx([0.5])
    assert [trace["finish"] for trace in second["traces"]] == ["eos", "marker"]
    assert second["traces"][0]["reward"] is None
    assert second["traces"][1]["advantage"] is None
    assert [len(trace["c"]) for trace in second["traces"]] == [1, 1]


def test_no_more_prompts_than_asked_for():
    assert [sample.index for sample in samples_of(scored(), Letters(), step=1, num_prompts=1)] == [7]


def test_resume_drops_samples_of_later_steps(tmp_path):
    for resume_step, steps in ((None, (10, 20, 30)), (20, (40,))):
        writer = SamplesWriter(tmp_path, resume_step)
        for step in steps:
            writer.write(samples_of(scored(), Letters(), step, num_prompts=2))
        writer.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert steps == [10, 10, 20, 20, 40, 40]

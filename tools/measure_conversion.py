"""Measures the peak memory of converting a random checkpoint of about 1 GB to Megatron and back.

    python tools/measure_conversion.py [--gigabytes 1] [--shard-megabytes 500] [--work-dir DIR]

Each direction runs as `nrt` in a process of its own, whose peak resident memory the kernel reports; it
includes Python, torch and every mapped file page. Fails when a peak is 1.5 times the largest shard or more,
or when the round trip is not bit-identical.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.names import hf_shapes
from nrt_megatron.convert.safetensors_io import INDEX, HFWeights
from nrt_megatron.convert.safetensors_writer import SafetensorsWriter

FACTOR = 1.5
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


def write_random_checkpoint(directory: Path, gigabytes: float, shard_megabytes: int) -> int:
    """Writes a bfloat16 Llama of about `gigabytes` in shards; returns the bytes of the largest file."""
    layers = 1
    while _num_bytes({**_CONFIG, "num_hidden_layers": layers}) < gigabytes * 1e9:
        layers += 1
    config = {**_CONFIG, "num_hidden_layers": layers}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {
        name: torch.empty(size, dtype=torch.bfloat16, device="meta")
        for name, size in hf_shapes(ModelShape.from_hf(config)).items()
    }
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_megabytes * 10**6,
    )
    generator = torch.Generator().manual_seed(0)
    for file, members in plan.filename_to_tensors.items():
        writer = SafetensorsWriter(directory / file, {name: tensors[name] for name in members})
        for name in members:
            writer.write(name, 0, torch.randn(tensors[name].shape, generator=generator).bfloat16())
        writer.close()
    if plan.is_sharded:
        (directory / INDEX).write_text(json.dumps({"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}))
    return max(path.stat().st_size for path in directory.glob("*.safetensors"))


def _num_bytes(config: dict) -> int:
    return sum(2 * torch.Size(size).numel() for size in hf_shapes(ModelShape.from_hf(config)).values())


# `ru_maxrss` of a child counts its parent's memory from before exec; the kernel's VmHWM does not.
_CHILD = """
import sys
from pathlib import Path
from nrt_megatron.cli import main
peak = Path(sys.argv.pop(1))
try:
    main()
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    peak.write_text(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
"""


def measure(peak_file: Path, *arguments: str) -> tuple[int, float]:
    """Runs `nrt ARGUMENTS`; returns its peak resident bytes and seconds. Raises when it fails."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", _CHILD, str(peak_file), *arguments], check=True)
    return int(peak_file.read_text()) * 1024, time.perf_counter() - start


def differing(first: Path, second: Path) -> list[str]:
    """Names of tensors that are not the same bit for bit."""
    ours, theirs = HFWeights(first), HFWeights(second)
    names = sorted(ours.tensors.keys() | theirs.tensors.keys())
    common = ours.tensors.keys() & theirs.tensors.keys()
    return [name for name in names if name not in common or not torch.equal(ours.read(name), theirs.read(name))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--shard-megabytes", type=int, default=500)
    parser.add_argument("--work-dir", type=Path, help="on a disk with room for three copies; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work_dir) as temporary:
        source, checkpoint, release = (Path(temporary) / name for name in ("hf", "checkpoint", "release"))
        largest = write_random_checkpoint(source, options.gigabytes, options.shard_megabytes)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        bound = FACTOR * largest
        print(f"{size / 1e6:.0f} MB in files of at most {largest / 1e6:.0f} MB; bound {bound / 1e6:.0f} MB")
        peaks = []
        for title, arguments in (
            ("convert", ("convert", str(source), str(checkpoint), "--no-tokenizer")),
            ("export", ("export", str(checkpoint), str(release))),
        ):
            peak, seconds = measure(Path(temporary) / "peak", *arguments)
            peaks.append(peak)
            share = peak / largest
            print(f"{title}: peak {peak / 1e6:.0f} MB resident ({share:.2f} of the largest file), {seconds:.1f} s")
        wrong = differing(source, release)
        print(f"round trip: {len(wrong)} tensors differ" + (f", first {wrong[0]}" if wrong else ""))
    return int(bool(wrong) or max(peaks) >= bound)


if __name__ == "__main__":
    sys.exit(main())

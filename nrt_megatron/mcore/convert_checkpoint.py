"""`nrt convert` and `nrt export`: the conversions with a progress bar and, when asked for, their proof."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

from nrt_megatron.checkpoints import CheckpointMeta
from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.exporter import export_hf
from nrt_megatron.convert.importer import import_hf
from nrt_megatron.convert.safetensors_io import HFWeights


def convert_hf_to_megatron(
    hf_dir: str | Path,
    out_dir: str | Path,
    *,
    add_token: Sequence[str] = (),
    init_from: str = "mean",
    tokenizer: bool = True,
    dtype: Optional[str] = None,
    verify: bool = False,
) -> CheckpointMeta:
    """Hugging Face directory to Megatron checkpoint; see `import_hf`. With `verify`, both models in memory in turn."""

    def proof(checkpoint: Path) -> None:
        if verify:
            _prove(checkpoint, Path(hf_dir), dtype)

    with _progress(f"convert {hf_dir}") as progress:
        return import_hf(
            Path(hf_dir),
            Path(out_dir),
            add_token=add_token,
            init_from=init_from,
            tokenizer=tokenizer,
            dtype=dtype,
            progress=progress,
            check=proof,
        )


def export_to_hf(
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    dtype: Optional[str] = None,
    max_shard_size: str = "5GB",
    verify: bool = False,
) -> ModelShape:
    """Megatron checkpoint of any layout to a Hugging Face directory; see `export_hf`. `verify` as above."""

    def proof(release: Path) -> None:
        if verify:
            kinds = {info.dtype for info in HFWeights(release).tensors.values()}
            _prove(Path(checkpoint), release, kinds.pop() if len(kinds) == 1 else None)

    with _progress(f"export {checkpoint}") as progress:
        return export_hf(
            Path(checkpoint),
            Path(out_dir),
            dtype=dtype,
            max_shard_size=max_shard_size,
            progress=progress,
            check=proof,
        )


def _prove(checkpoint: Path, hf_dir: Path, dtype: Optional[str]) -> None:
    from nrt_megatron.mcore.verify import verify

    print(f"verified on {verify(checkpoint, hf_dir, dtype)}", file=sys.stderr)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of bytes on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

"""Draws a finished run as it looks in a terminal: `render_run.py RUN_DIR OUT.svg` (the picture of the README)."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console

from nrt_megatron.checkpoints import latest
from nrt_megatron.report import Progress, print_summary, read_metrics


def main(run_dir: Path, out: Path) -> None:
    rows = read_metrics(run_dir)
    console = Console(record=True, width=132, file=io.StringIO(), highlight=False)
    console.print(f"$ make train  [dim]# {len(rows) - 1} steps of {run_dir.name}[/]")
    progress = Progress(rows[-1]["step"], console=console)
    for row in rows:
        progress.show(row) if row["step"] in (0, 1, 10, 20, 30, 40, 50) else None
    print_summary(rows, run_dir, latest(run_dir / "checkpoints"), console)
    out.write_text(console.export_svg(title="nrt-megatron"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

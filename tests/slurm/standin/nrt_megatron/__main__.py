"""What the Slurm scripts need of `nrt`, without torch: ranks that count steps and heed signals.

`train RECIPE [key=value ...] --dry-run` prints the recipe, `train RECIPE` is a rank, `plan RECIPE` one line;
`convert` and `export` make their output directory. Keys of a recipe that only this program has, under `act:`:
`steps` and `seconds` a step; `fail_rank` ends at once with `fail_code`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import yaml

UNFINISHED = 75
asked = []


def resolve(path: str, overrides: list[str]) -> dict[str, Any]:
    """The recipe with dotted overrides; exit code 2 when there is none."""
    if not Path(path).exists():
        print(f"nrt: {path}: no such recipe\nnrt: give a YAML file", file=sys.stderr)
        sys.exit(2)
    recipe = yaml.safe_load(Path(path).read_text())
    for override in overrides:
        key, value = override.split("=", 1)
        *sections, last = key.split(".")
        place = recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = yaml.safe_load(value)
    return recipe


def rank(recipe: dict[str, Any]) -> int:
    """Counts to `steps` in a file of its own, from where an earlier start stopped."""
    me, act, run_dir = int(os.environ["RANK"]), recipe["act"], Path(recipe["run_dir"])
    print(f"rank {me} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}", flush=True)
    if me == act.get("fail_rank"):
        print(f"rank {me} gives up", flush=True)
        return act["fail_code"]
    done = run_dir / f"steps-{me}.txt"
    first = len(done.read_text().split()) if done.exists() else 0
    for step in range(first + 1, act["steps"] + 1):
        time.sleep(act["seconds"])
        with done.open("a") as file:
            file.write(f"{step}\n")
        if asked:
            print(f"rank {me} stops after step {step}", flush=True)
            return UNFINISHED
    if me == 0:
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        (run_dir / "checkpoints/latest").write_text(f"step_{act['steps']:08d}")
    return 0


def main() -> int:
    """Exit code of the command in `sys.argv`."""
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(signum, lambda number, frame: asked.append(number))
    command, path, *rest = sys.argv[1:]
    if command == "plan":
        print(f"plan of {path}")
    elif command in ("convert", "export"):
        Path(rest[0]).mkdir(parents=True)
        (Path(rest[0]) / "meta.json").write_text(path)
    elif "--dry-run" in rest:
        print(yaml.safe_dump(resolve(path, [word for word in rest if "=" in word]), sort_keys=False), end="")
    else:
        return rank(resolve(path, []))
    return 0


if __name__ == "__main__":
    sys.exit(main())

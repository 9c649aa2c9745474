"""One rank of a run: `python -m nrt_megatron.worker RECIPE_YAML`, started by torchrun, srun or `nrt train`."""

from __future__ import annotations

import os
import sys

from nrt_megatron.recipe import ConfigError, from_yaml


def main(recipe_path: str) -> int:
    """Trains; returns the exit code: 0, 2 for what the user can mend (said once), 1 for the rest."""
    with open(recipe_path) as file:
        recipe = from_yaml(file.read())
    from nrt_megatron.trainer import train

    try:
        train(recipe)
    except ConfigError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"nrt: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

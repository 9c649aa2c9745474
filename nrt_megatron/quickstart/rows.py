"""Rows of question-answer files, and which of them are held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path


def is_held_out(question: str, one_in: int) -> bool:
    """Whether the hash of the question is 0 modulo `one_in`: a question stays on its side whatever else is added."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % one_in == 0


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """One JSON object a line, UTF-8."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")

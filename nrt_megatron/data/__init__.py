"""Question-answer data: tokenizers, prompt templates, files of rows, and the order they come in. No torch."""

from nrt_megatron.data.dataset import CheckReport, QADataset
from nrt_megatron.data.example import REASONS, BadRow, Example
from nrt_megatron.data.limits import Limits
from nrt_megatron.data.sampler import PromptSampler
from nrt_megatron.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "REASONS",
    "BadRow",
    "CheckReport",
    "Example",
    "Limits",
    "PromptSampler",
    "QADataset",
    "Tokenizer",
    "load_tokenizer",
]

"""Native Reasoning Training on Megatron-Core: recipe in, trained model out."""

__version__ = "0.1.0"

"""Comparison of the objective with numbers recorded from the authors' code; used by `tools/check_oracle.py`."""

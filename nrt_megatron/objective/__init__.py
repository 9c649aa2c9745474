"""Rewards, group advantages and the NRT loss as pure tensor math: (sum, count), never a division by the batch."""

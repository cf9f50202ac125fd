"""Softmax attention that measures where it looks: one function, several implementations."""

from kernels.attention.api import AttentionOutput, sink_attention
from kernels.attention.statistics import Statistics, StatisticsLevel, null_mass

__all__ = ["AttentionOutput", "Statistics", "StatisticsLevel", "null_mass", "sink_attention"]

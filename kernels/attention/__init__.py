"""Softmax attention that measures where it looks: one function, several implementations."""

from kernels.attention.api import AttentionOutput, sink_attention
from kernels.attention.statistics import Statistics, StatisticsLevel

__all__ = ["AttentionOutput", "Statistics", "StatisticsLevel", "sink_attention"]

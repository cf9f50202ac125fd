"""Probes of checkpoints: one file each, with its formula, paper and cost."""

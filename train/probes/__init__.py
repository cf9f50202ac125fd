"""Probes of checkpoints: one file each, with its formula, paper and cost.

A probe is a function of a decoder and a probe set that yields findings; a new one is its file and
its line here.
"""

from train.probes.base import Finding, Probe, ProbeInputs
from train.probes.circuit import probe_circuit
from train.probes.documents import probe_documents
from train.probes.in_front import probe_in_front
from train.probes.interventions import probe_interventions
from train.probes.losses import probe_losses
from train.probes.mixing import probe_mixing
from train.probes.norms import probe_norms
from train.probes.sinks import probe_sinks

__all__ = ["PROBES", "Finding", "Probe", "ProbeInputs"]

PROBES: dict[str, Probe] = {
    "sinks": probe_sinks,
    "losses": probe_losses,
    "in_front": probe_in_front,
    "norms": probe_norms,
    "mixing": probe_mixing,
    "circuit": probe_circuit,
    "interventions": probe_interventions,
    "documents": probe_documents,
}
"""By name: what ``python -m scripts.probe`` runs."""

"""Probes: what a finished model shows when it is asked, by our definitions."""

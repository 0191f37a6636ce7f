"""Ranks, how they were launched, and the machine they run on."""

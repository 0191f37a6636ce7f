"""Carry out one command from beginning to end."""

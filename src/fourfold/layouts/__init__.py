"""Tensor names and configuration files that engines expect."""

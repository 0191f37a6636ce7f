# SPDX-License-Identifier: Apache-2.0
"""Ranks, how they were launched, and the machine they run on."""

# SPDX-License-Identifier: Apache-2.0
"""Carry out one command from beginning to end."""

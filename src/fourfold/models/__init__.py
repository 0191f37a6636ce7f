# SPDX-License-Identifier: Apache-2.0
"""The contents of a model: its module tree, its linear weights, and their places on disk."""

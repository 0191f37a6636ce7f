# SPDX-License-Identifier: Apache-2.0
"""A transformers model in memory as a source."""

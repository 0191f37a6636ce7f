# SPDX-License-Identifier: Apache-2.0
"""Files: safetensors, fingerprints, atomic output, the state of a run."""

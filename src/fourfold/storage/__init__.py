"""Files: safetensors, fingerprints, atomic output, the state of a run."""

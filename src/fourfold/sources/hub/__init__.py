# SPDX-License-Identifier: Apache-2.0
"""Models on the Hugging Face hub, whose shards are fetched when they are needed."""

from fourfold.sources.hub.source import HubSource, open_hub

__all__ = ["HubSource", "open_hub"]

# SPDX-License-Identifier: Apache-2.0
"""Models on the hub, read from a stand-in on loopback."""

"""Nodes for Ray's autoscaler as processes on this machine; Ray's monitor loads this by name."""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class NodesWithMemory(FakeMultiNodeProvider):
    """Nodes that each detect their own memory.

    Ray's own fake nodes cannot declare memory, so no actor that asks for some fits on them.
    """

    def create_node_with_resources_and_labels(
        self,
        node_config: Any,
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        """Start `count` nodes of a type."""
        known = {name: value for name, value in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(node_config, tags, count, known, labels)

"""What stands in a scene, for the tests."""

from __future__ import annotations

from autoprune.tiny import Scene, SceneObject


def of_kind(scene: Scene, kind: str) -> list[SceneObject]:
    """The objects of one kind, in drawing order."""
    return [item for item in scene.objects if item.kind == kind]

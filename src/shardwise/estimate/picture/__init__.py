"""A layer drawn as on a whiteboard: its matrices cut in the ranks' colours, and the collectives between them."""

from shardwise.estimate.picture.scene import Box, Scene, scene
from shardwise.estimate.picture.svg import to_svg
from shardwise.estimate.picture.terminal import to_text

__all__ = ["Box", "Scene", "scene", "to_svg", "to_text"]

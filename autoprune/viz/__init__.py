"""Pictures of what pruning did: what was kept, where the text looks, schedules over depth; and pages of them.

Functions return matplotlib figures (`kept_patches` a PIL image); `to_png` encodes both.
"""

from .attention import attention_over_depth, half_of_attention
from .counts import kept_by_view
from .depth import animate_kept, kept_at_layer, kept_over_depth, summary_over_depth
from .information import information_by_kind, information_of_kinds
from .patches import GAP, default_layers, kept_patches, square_grid, tile
from .schedules import plot_schedule, retention_curves, tokens_against_flat
from .style import COLOURS, FAINT, INK, PAPER, matplotlib_parts, to_png
from .views import View, join_tiles, views_of

__all__ = [
    "COLOURS",
    "FAINT",
    "GAP",
    "INK",
    "PAPER",
    "View",
    "animate_kept",
    "attention_over_depth",
    "default_layers",
    "half_of_attention",
    "information_by_kind",
    "information_of_kinds",
    "join_tiles",
    "kept_at_layer",
    "kept_by_view",
    "kept_over_depth",
    "kept_patches",
    "matplotlib_parts",
    "plot_schedule",
    "retention_curves",
    "square_grid",
    "summary_over_depth",
    "tile",
    "to_png",
    "tokens_against_flat",
    "views_of",
]

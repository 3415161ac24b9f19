"""What a command is given as text."""

from ..methods.from_text import budget_text, build_method, parse_budget, parse_methods

__all__ = ["budget_text", "build_method", "parse_budget", "parse_methods"]

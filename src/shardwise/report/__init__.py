"""How the tools show what they found: as text of a fixed width, and as web pages that stand alone."""

from shardwise.report.page import Page, Section
from shardwise.report.text import as_text

__all__ = ["Page", "Section", "as_text"]

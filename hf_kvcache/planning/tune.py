"""`tune`: measures, solves, verifies on held-back text, and returns a plan."""

from __future__ import annotations

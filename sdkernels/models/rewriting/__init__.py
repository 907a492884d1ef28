"""Reads a block's forward, cuts out its branches, and writes one that hands them to the op."""

from .rewriter import Branch, Call, Left, Rewriting, rewriting_of

__all__ = ["Branch", "Call", "Left", "Rewriting", "rewriting_of"]

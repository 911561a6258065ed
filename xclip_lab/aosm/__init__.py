"""Attention over the similarity matrix."""

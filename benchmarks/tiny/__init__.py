"""Pair T: a character-level target and draft that this repository trains from scratch on a small SQL task."""

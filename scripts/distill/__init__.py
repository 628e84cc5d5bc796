"""Trains a small draft for a target model on text that the target samples itself."""

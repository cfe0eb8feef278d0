"""Measures of what a sweep observes, each a small class in one registry."""

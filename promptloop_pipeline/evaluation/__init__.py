"""Judging generations, and showing them."""

"""Damaged files and messages for everything that reads what others wrote."""

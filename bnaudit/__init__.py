"""Audits BatchNorm implementations numerically against a certified float64 reference."""

__version__ = "0.1.0"

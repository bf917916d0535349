"""The subject's side of an audit: self-contained, started in any interpreter that has NumPy."""

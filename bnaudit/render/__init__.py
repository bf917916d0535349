"""Report → text: each format is a pure function."""

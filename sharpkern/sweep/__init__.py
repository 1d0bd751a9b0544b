"""Phase diagrams: many runs from one TOML file, their table, and a report."""

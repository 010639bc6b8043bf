"""JSON and YAML: read within bounds, without ambiguity, of the types asked for."""

"""How models write tool calls: one file each, found by its name (`--tool-call-parser`)."""

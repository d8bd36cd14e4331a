"""Options: one dataclass tree, YAML and command line, presets, cross-field checks. No torch."""

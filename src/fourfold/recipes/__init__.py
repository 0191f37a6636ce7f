"""What to do, by role: recipes in YAML."""

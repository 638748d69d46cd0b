"""Words that every part uses."""

"""Anti-entropy of signed records over a direct stream: see SPEC.md."""

"""How a node announces, checks and carries out a move to other layers. See SPEC.md."""

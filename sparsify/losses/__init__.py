"""The loss that trains SAEs: its terms, their math, and the passes they are computed from."""

"""Puts SAEs in place of activations, and changes what they write."""

"""Policies: how many draft tokens each sequence may verify. Plain Python; never imports torch."""

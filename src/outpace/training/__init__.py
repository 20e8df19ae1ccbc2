"""Trains the drafts that are served: `outpace train`, `outpace distill`, `outpace evaluate`."""

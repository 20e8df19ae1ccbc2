"""The engine: admission, scheduling, text, metrics, and the step that joins them to the model."""

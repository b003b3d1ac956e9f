"""Text: examples, files, conversations, prompts and tokens."""
